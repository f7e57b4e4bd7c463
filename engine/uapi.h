// SPDX-License-Identifier: Apache-2.0
// The parts of linux/userfaultfd.h that the engine uses, as of Linux 7.3. Ours, because build hosts have old headers;
// a test compares them with the newest header that can be had.
#ifndef UF_UAPI_H
#define UF_UAPI_H

#include <linux/types.h>
#include <sys/ioctl.h>

#define UFFD_API 0xAAULL
#define UFFD_USER_MODE_ONLY 1
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)

enum { UFFD_EVENT_PAGEFAULT = 0x12, UFFD_EVENT_REMAP = 0x14, UFFD_EVENT_REMOVE = 0x15, UFFD_EVENT_UNMAP = 0x16 };
enum { UFFD_PAGEFAULT_FLAG_WRITE = 1, UFFD_PAGEFAULT_FLAG_WP = 2, UFFD_PAGEFAULT_FLAG_MINOR = 4, UFFD_PAGEFAULT_FLAG_RWP = 8 };

#define UFFD_FEATURE_PAGEFAULT_FLAG_WP (1ULL << 0)
#define UFFD_FEATURE_EVENT_REMAP (1ULL << 2)
#define UFFD_FEATURE_EVENT_REMOVE (1ULL << 3)
#define UFFD_FEATURE_EVENT_UNMAP (1ULL << 6)
#define UFFD_FEATURE_SIGBUS (1ULL << 7)
#define UFFD_FEATURE_THREAD_ID (1ULL << 8)
#define UFFD_FEATURE_EXACT_ADDRESS (1ULL << 11)
#define UFFD_FEATURE_POISON (1ULL << 14)
#define UFFD_FEATURE_MOVE (1ULL << 16)
#define UFFD_FEATURE_RWP (1ULL << 17)
#define UFFD_FEATURE_RWP_ASYNC (1ULL << 18)

#define UFFDIO_REGISTER_MODE_MISSING 1ULL
#define UFFDIO_REGISTER_MODE_WP 2ULL
#define UFFDIO_REGISTER_MODE_RWP 8ULL
#define UFFDIO_COPY_MODE_DONTWAKE 1ULL
#define UFFDIO_COPY_MODE_WP 2ULL
#define UFFDIO_MOVE_MODE_DONTWAKE 1ULL
#define UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES 2ULL
#define UFFDIO_WRITEPROTECT_MODE_WP 1ULL
#define UFFDIO_RWPROTECT_MODE_RWP 1ULL
#define UFFDIO_POISON_MODE_DONTWAKE 1ULL

struct uffd_msg {
	__u8 event, reserved1;
	__u16 reserved2;
	__u32 reserved3;
	union {
		struct {
			__u64 flags, address;
			union {
				__u32 ptid;
			} feat;
		} pagefault;
		struct {
			__u64 from, to, len;
		} remap;
		struct {
			__u64 start, end;
		} remove; // and unmap
		__u64 reserved[3];
	} arg;
} __attribute__((packed));

struct uffdio_api {
	__u64 api, features, ioctls;
};
struct uffdio_range {
	__u64 start, len;
};
struct uffdio_register {
	struct uffdio_range range;
	__u64 mode, ioctls;
};
struct uffdio_copy {
	__u64 dst, src, len, mode;
	__s64 copy;
};
struct uffdio_move {
	__u64 dst, src, len, mode;
	__s64 move;
};
struct uffdio_writeprotect {
	struct uffdio_range range;
	__u64 mode;
};
struct uffdio_zeropage {
	struct uffdio_range range;
	__u64 mode;
	__s64 zeropage;
};
struct uffdio_poison {
	struct uffdio_range range;
	__u64 mode;
	__s64 updated;
};
struct uffdio_rwprotect {
	struct uffdio_range range;
	__u64 mode;
};
struct uffdio_set_mode {
	__u64 enable, disable;
};

#define UFFDIO_API _IOWR(0xAA, 0x3F, struct uffdio_api)
#define UFFDIO_REGISTER _IOWR(0xAA, 0x00, struct uffdio_register)
#define UFFDIO_UNREGISTER _IOR(0xAA, 0x01, struct uffdio_range)
#define UFFDIO_WAKE _IOR(0xAA, 0x02, struct uffdio_range)
#define UFFDIO_COPY _IOWR(0xAA, 0x03, struct uffdio_copy)
#define UFFDIO_ZEROPAGE _IOWR(0xAA, 0x04, struct uffdio_zeropage)
#define UFFDIO_MOVE _IOWR(0xAA, 0x05, struct uffdio_move)
#define UFFDIO_WRITEPROTECT _IOWR(0xAA, 0x06, struct uffdio_writeprotect)
#define UFFDIO_POISON _IOWR(0xAA, 0x08, struct uffdio_poison)
#define UFFDIO_RWPROTECT _IOWR(0xAA, 0x09, struct uffdio_rwprotect)
#define UFFDIO_SET_MODE _IOW(0xAA, 0x0A, struct uffdio_set_mode)

// Missing from older system headers.
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24 // 5.18
#endif

#endif
