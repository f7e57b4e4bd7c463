// SPDX-License-Identifier: Apache-2.0
// uapi.h against the kernel's numbers and layouts (shared with every 64-bit architecture but for the system call's number),
// and, where the build host's header is new enough, against that.
#include <stddef.h>

#include "harness.h"
#include "uapi.h"

#define SIZE(type, size) _Static_assert(sizeof(struct type) == (size), #type)
#define AT(type, field, offset) _Static_assert(offsetof(struct type, field) == (offset), #type "." #field)
#define IS(name, value) _Static_assert((name) == (value), #name)

SIZE(uffdio_api, 24);
AT(uffdio_api, api, 0);
AT(uffdio_api, features, 8);
AT(uffdio_api, ioctls, 16);
SIZE(uffdio_range, 16);
AT(uffdio_range, start, 0);
AT(uffdio_range, len, 8);
SIZE(uffdio_register, 32);
AT(uffdio_register, range, 0);
AT(uffdio_register, mode, 16);
AT(uffdio_register, ioctls, 24);
SIZE(uffdio_copy, 40);
AT(uffdio_copy, dst, 0);
AT(uffdio_copy, src, 8);
AT(uffdio_copy, len, 16);
AT(uffdio_copy, mode, 24);
AT(uffdio_copy, copy, 32);
SIZE(uffdio_move, 40);
AT(uffdio_move, dst, 0);
AT(uffdio_move, src, 8);
AT(uffdio_move, len, 16);
AT(uffdio_move, mode, 24);
AT(uffdio_move, move, 32);
SIZE(uffdio_writeprotect, 24);
AT(uffdio_writeprotect, range, 0);
AT(uffdio_writeprotect, mode, 16);
SIZE(uffdio_poison, 32);
AT(uffdio_poison, range, 0);
AT(uffdio_poison, mode, 16);
AT(uffdio_poison, updated, 24);
SIZE(uffdio_zeropage, 32);
AT(uffdio_zeropage, zeropage, 24);
SIZE(uffdio_rwprotect, 24);
AT(uffdio_rwprotect, mode, 16);
SIZE(uffdio_set_mode, 16);
AT(uffdio_set_mode, disable, 8);
SIZE(uffd_msg, 32);
AT(uffd_msg, arg.remap.from, 8);
AT(uffd_msg, arg.remap.to, 16);
AT(uffd_msg, arg.remap.len, 24);
AT(uffd_msg, arg.remove.start, 8);
AT(uffd_msg, arg.remove.end, 16);
AT(uffd_msg, event, 0);
AT(uffd_msg, arg.pagefault.flags, 8);
AT(uffd_msg, arg.pagefault.address, 16);
AT(uffd_msg, arg.pagefault.feat.ptid, 24);
_Static_assert(sizeof(((struct uffdio_copy *)0)->copy) == 8 && (__typeof__(((struct uffdio_copy *)0)->copy))-1 < 0, "signed");
_Static_assert((__typeof__(((struct uffdio_move *)0)->move))-1 < 0, "signed");
_Static_assert((__typeof__(((struct uffdio_poison *)0)->updated))-1 < 0, "signed");

IS(UFFD_API, 0xAA);
IS(UFFD_USER_MODE_ONLY, 1);
IS(UFFD_EVENT_PAGEFAULT, 0x12);
IS(UFFD_PAGEFAULT_FLAG_WRITE, 1);
IS(UFFD_PAGEFAULT_FLAG_WP, 2);
IS(UFFD_PAGEFAULT_FLAG_MINOR, 4);
IS(UFFD_FEATURE_PAGEFAULT_FLAG_WP, 1 << 0);
IS(UFFD_FEATURE_THREAD_ID, 1 << 8);
IS(UFFD_FEATURE_POISON, 1 << 14);
IS(UFFD_FEATURE_MOVE, 1 << 16);
IS(UFFD_FEATURE_RWP, 1 << 17);
IS(UFFD_FEATURE_RWP_ASYNC, 1 << 18);
IS(UFFD_FEATURE_EVENT_REMAP, 1 << 2);
IS(UFFD_FEATURE_EVENT_REMOVE, 1 << 3);
IS(UFFD_FEATURE_EVENT_UNMAP, 1 << 6);
IS(UFFD_EVENT_REMAP, 0x14);
IS(UFFD_EVENT_REMOVE, 0x15);
IS(UFFD_EVENT_UNMAP, 0x16);
IS(UFFD_PAGEFAULT_FLAG_RWP, 8);
IS(UFFDIO_REGISTER_MODE_RWP, 8);
IS(UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES, 2);
IS(UFFDIO_RWPROTECT_MODE_RWP, 1);
IS(UFFDIO_REGISTER_MODE_MISSING, 1);
IS(UFFDIO_REGISTER_MODE_WP, 2);
IS(UFFDIO_COPY_MODE_DONTWAKE, 1);
IS(UFFDIO_COPY_MODE_WP, 2);
IS(UFFDIO_MOVE_MODE_DONTWAKE, 1);
IS(UFFDIO_WRITEPROTECT_MODE_WP, 1);
IS(UFFDIO_POISON_MODE_DONTWAKE, 1);

#if defined(__x86_64__) || defined(__i386__) || defined(__aarch64__) || defined(__riscv) // the generic encoding of ioctls
IS(USERFAULTFD_IOC_NEW, 0x0000AA00);
IS(UFFDIO_API, 0xC018AA3F);
IS(UFFDIO_REGISTER, 0xC020AA00);
IS(UFFDIO_UNREGISTER, 0x8010AA01);
IS(UFFDIO_WAKE, 0x8010AA02);
IS(UFFDIO_COPY, 0xC028AA03);
IS(UFFDIO_ZEROPAGE, 0xC020AA04);
IS(UFFDIO_MOVE, 0xC028AA05);
IS(UFFDIO_WRITEPROTECT, 0xC018AA06);
IS(UFFDIO_POISON, 0xC020AA08);
IS(UFFDIO_RWPROTECT, 0xC018AA09);
IS(UFFDIO_SET_MODE, 0x4010AA0A);
#endif

int main(int argc, char **argv)
{
	test_start(argc, argv);
	return 0;
}
