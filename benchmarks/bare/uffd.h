// The few pieces of the userfaultfd interface that the bare loops need.
//
// The definitions are ours: the header of a build host is often older than its kernel (no UFFDIO_MOVE before 6.8).
// Layout and numbers as in Linux 4.3 (COPY), 4.14 (SIGBUS), 5.7 (WRITEPROTECT), 6.1 (/dev/userfaultfd) and 6.8 (MOVE).
#ifndef BARE_UFFD_H
#define BARE_UFFD_H

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
	UFFD_EVENT_PAGEFAULT = 0x12,
	UFFD_REGISTER_MISSING = 1,
	UFFD_REGISTER_WP = 2,
	UFFD_COPY_WP = 2,
	UFFD_FEATURE_SIGBUS = 1 << 7,
	UFFD_USER_MODE_ONLY = 1,
};

struct uffd_api {
	uint64_t api, features, ioctls;
};

struct uffd_register_range {
	uint64_t start, len, mode, ioctls;
};

// COPY and MOVE take the same structure; `done` is their result field (bytes, or a negative errno).
struct uffd_fill {
	uint64_t dst, src, len, mode;
	int64_t done;
};

// Mode 0 takes the protection away, and wakes who waits for that.
struct uffd_writeprotect {
	uint64_t start, len, mode;
};

struct uffd_msg {
	uint8_t event, reserved1;
	uint16_t reserved2;
	uint32_t reserved3;
	uint64_t flags, address, thread;
};

_Static_assert(sizeof(struct uffd_msg) == 32, "the kernel hands out 32-byte messages");

static const unsigned long UFFD_NEW_IOCTL = 0xaa00;
static const unsigned long UFFD_API_IOCTL = 0xc018aa3f;
static const unsigned long UFFD_REGISTER_IOCTL = 0xc020aa00;
static const unsigned long UFFD_COPY_IOCTL = 0xc028aa03;
static const unsigned long UFFD_MOVE_IOCTL = 0xc028aa05;
static const unsigned long UFFD_WRITEPROTECT_IOCTL = 0xc018aa06;

_Noreturn static inline void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

// Opens a userfaultfd the strongest way this process may (device, system call, user mode only) and shakes hands.
static inline int uffd_open(int flags, uint64_t features)
{
	int fd = -1;
	int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (device >= 0) {
		fd = ioctl(device, UFFD_NEW_IOCTL, flags);
		close(device);
	}
#ifdef SYS_userfaultfd
	if (fd < 0)
		fd = syscall(SYS_userfaultfd, flags);
	if (fd < 0)
		fd = syscall(SYS_userfaultfd, flags | UFFD_USER_MODE_ONLY);
#endif
	if (fd < 0)
		die("userfaultfd");
	struct uffd_api api = { .api = 0xaa, .features = features };
	if (ioctl(fd, UFFD_API_IOCTL, &api))
		die("UFFDIO_API");
	return fd;
}

// Maps `len` bytes of anonymous memory at an address that is a multiple of 2 MiB.
static inline char *map_aligned(size_t len)
{
	const size_t align = 2u << 20;
	char *map = mmap(NULL, len + align, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (map == MAP_FAILED)
		die("mmap");
	return (char *)(((uintptr_t)map + align - 1) & ~(align - 1));
}

static inline void uffd_register(int fd, char *start, size_t len, uint64_t mode)
{
	struct uffd_register_range reg = { .start = (uintptr_t)start, .len = len, .mode = mode };
	if (ioctl(fd, UFFD_REGISTER_IOCTL, &reg))
		die("UFFDIO_REGISTER");
}

#endif
