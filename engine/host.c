// SPDX-License-Identifier: Apache-2.0
// What this kernel and user can do, and the two system calls whose support varies.
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "internal.h"

// process_madvise takes MADV_DONTNEED on the own process since 6.13 and PIDFD_SELF_THREAD_GROUP instead of a descriptor (which
// fork would have to renew) since 6.14. A kernel without them gets one madvise per range.
#define UF_PIDFD_SELF_PROCESS (-10001)

static struct uf_host host;
static pthread_once_t host_once = PTHREAD_ONCE_INIT;
// Kept open for ever: a forked child that has dropped its privileges can still make a userfaultfd from it.
static int device = -1;

static int api(int fd, uint64_t features, uint64_t *available)
{
	struct uffdio_api a = {.api = UFFD_API, .features = features};
	if (ioctl(fd, UFFDIO_API, &a))
		return -errno;
	if (available)
		*available = a.features;
	return 0;
}

// Opens without the handshake. Full rights first, on any error the next weaker way (userfaultfd-rs falls back on ENOENT
// only, which leaves out containers where the device exists and is closed).
static int open_raw(bool user_mode_only, int *via, int *first_error)
{
	int fd = -1;
	*first_error = 0;
	if (!user_mode_only) {
		if (device >= 0) {
			fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
			*via = 1;
		} else {
			*first_error = ENOENT;
		}
		if (fd < 0) {
			fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
			*via = 2;
			if (fd < 0)
				*first_error = errno;
		}
	}
	if (fd < 0) {
		fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
		*via = 3;
	}
	if (fd < 0) {
		*via = 0;
		*first_error = errno;
		return -errno;
	}
	fd = uf_high_fd(fd);
	return fd < 0 ? -errno : fd;
}

int uf_uffd_open(bool user_mode_only, uint64_t features, int *ret)
{
	int via, first;
	int fd = open_raw(user_mode_only, &via, &first);
	if (fd < 0)
		return fd;
	int err = api(fd, features, NULL);
	if (err) {
		close(fd);
		return err;
	}
	*ret = fd;
	return 0;
}

static void probe(void)
{
	int fd = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (fd >= 0)
		device = uf_high_fd(fd);
	int uffd = open_raw(false, &host.open_via, &host.open_errno);
	if (uffd >= 0) {
		if (api(uffd, 0, &host.features))
			host.features = 0;
		close(uffd);
	}
	host.move = host.features & UFFD_FEATURE_MOVE;
	host.poison = host.features & UFFD_FEATURE_POISON;
	host.wp = host.features & UFFD_FEATURE_PAGEFAULT_FLAG_WP;

	char text[128] = "";
	fd = open("/sys/kernel/mm/transparent_hugepage/enabled", O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		ssize_t n = read(fd, text, sizeof(text) - 1);
		text[n > 0 ? n : 0] = 0;
		close(fd);
	}
	host.thp = strstr(text, "[always]") || strstr(text, "[madvise]");

	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	char *p = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p != MAP_FAILED) {
		struct iovec v = {p, page};
		p[0] = 1;
		host.process_madvise =
			syscall(SYS_process_madvise, UF_PIDFD_SELF_PROCESS, &v, 1, MADV_DONTNEED, 0) == (long)page && p[0] == 0;
		munmap(p, page);
	}
}

const struct uf_host *uf_host_probe(void)
{
	pthread_once(&host_once, probe);
	return &host;
}

int uf_range_wake(int uffd, const void *start, size_t len)
{
	struct uffdio_range r = {(uintptr_t)start, len};
	return ioctl(uffd, UFFDIO_WAKE, &r) ? -errno : 0;
}

// Drops pages of many ranges, with one TLB flush where the kernel can. Blocks shortly; no lock needed.
void uf_forget_pages(struct uf_memory *m, const struct uf_range *ranges, unsigned n)
{
	struct iovec v[UF_BATCH];
	size_t total = 0;
	for (unsigned i = 0; i < n; i++) {
		v[i].iov_base = uf_block_address(m, ranges[i].first);
		v[i].iov_len = ranges[i].count << m->shift;
		total += v[i].iov_len;
	}
	if (n > 1 && host.process_madvise &&
	    syscall(SYS_process_madvise, UF_PIDFD_SELF_PROCESS, v, n, MADV_DONTNEED, 0) == (long)total)
		return;
	for (unsigned i = 0; i < n; i++)
		if (madvise(v[i].iov_base, v[i].iov_len, MADV_DONTNEED)) // EINVAL: mlocked
			madvise(v[i].iov_base, v[i].iov_len, MADV_DONTNEED_LOCKED);
}
