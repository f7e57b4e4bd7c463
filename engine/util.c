// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

#ifndef MADV_COLD
#define MADV_COLD 20
#endif

uint64_t uf_now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

// One line on stderr by write(2): the thread that waits in a fault may hold stdio's lock, or Python's.
void uf_log(const char *format, ...)
{
	char line[1024] = "userfault: ";
	va_list args;
	va_start(args, format);
	int n = vsnprintf(line + 11, sizeof(line) - 12, format, args);
	va_end(args);
	if (n < 0)
		return;
	size_t len = 11 + uf_min((uint64_t)n, sizeof(line) - 13);
	for (size_t i = 11; i < len; i++) // a source's message may hold anything
		if ((unsigned char)line[i] < ' ')
			line[i] = ' ';
	line[len++] = '\n';
	// stderr may be a pipe that this very process reads, by a thread that waits for what we hold up: rather lose the line
	// than wait. A pipe that polls writable takes PIPE_BUF bytes, more than any line.
	struct pollfd f = {STDERR_FILENO, POLLOUT, 0};
	if (poll(&f, 1, 0) != 1 || !(f.revents & POLLOUT))
		return;
	ssize_t ignored = write(STDERR_FILENO, line, len);
	(void)ignored;
}

void uf_histogram_add(struct uf_histogram *h, uint64_t ns)
{
	// Bucket 4 * octave + the two bits after the leading one; below 4 ns one bucket per value.
	unsigned bucket = (unsigned)ns;
	if (ns >= 4) {
		unsigned octave = 63 - (unsigned)__builtin_clzll(ns);
		bucket = 4 * (octave - 1) + (unsigned)(ns >> (octave - 2) & 3);
	}
	h->count++;
	h->sum_ns += ns;
	h->buckets[bucket < UF_BUCKETS ? bucket : UF_BUCKETS - 1]++;
}

// It is held for some 100 ns at a time, while waiting in the kernel and being woken costs several µs: so spin a little first
// (glibc: at most 100 times, fewer where that did not help).
void uf_mutex_init(pthread_mutex_t *lock)
{
	pthread_mutexattr_t kind;
	pthread_mutexattr_init(&kind);
#ifdef __GLIBC__
	pthread_mutexattr_settype(&kind, PTHREAD_MUTEX_ADAPTIVE_NP);
#endif
	pthread_mutex_init(lock, &kind);
	pthread_mutexattr_destroy(&kind);
}

// Engine threads block every signal: else the program's handlers would run on them.
int uf_thread_start(pthread_t *thread, void *(*run)(void *), void *arg)
{
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	int err = pthread_create(thread, NULL, run, arg);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return -err;
}

void uf_thread_name(const char *name)
{
	prctl(PR_SET_NAME, name, 0, 0, 0);
}

// UFFDIO_MOVE asks whether a page is this process's alone of the first page of the large folio that it is in (mm/userfaultfd.c: it
// looks at folio->page). Where a forked child, gone since, had shared the folio, making the pages to be moved one's own does not help
// then, as long as they are a part of it. MADV_COLD (5.4) splits a folio that it covers in part.
void uf_cut_huge_page(void *at, size_t length)
{
	madvise(at, length, MADV_COLD);
}

int uf_high_dup(int fd)
{
	int high = fcntl(fd, F_DUPFD_CLOEXEC, 16);
	if (high < 0 && errno == EINVAL) // RLIMIT_NOFILE is below that
		errno = EMFILE;
	return high;
}

int uf_high_fd(int fd)
{
	if (fd < 0 || fd >= 16)
		return fd;
	int high = uf_high_dup(fd);
	int saved = errno;
	close(fd);
	errno = saved;
	return high;
}

void uf_bell_ring(int fd)
{
	uint64_t one = 1;
	ssize_t ignored = write(fd, &one, sizeof(one));
	(void)ignored;
}

void uf_bell_drain(int fd)
{
	uint64_t n;
	ssize_t ignored = read(fd, &n, sizeof(n));
	(void)ignored;
}

// Shared futexes: owner and workers are different processes.
long uf_futex_wait(_Atomic uint32_t *word, uint32_t value, uint64_t timeout_ns)
{
	struct timespec t = {.tv_sec = (time_t)(timeout_ns / 1000000000u), .tv_nsec = (long)(timeout_ns % 1000000000u)};
	return syscall(SYS_futex, word, FUTEX_WAIT, value, &t, NULL, 0);
}

long uf_futex_wake(_Atomic uint32_t *word, int n)
{
	return syscall(SYS_futex, word, FUTEX_WAKE, n, NULL, NULL, 0);
}
