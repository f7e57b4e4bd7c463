// Bare write-protect faults: the first write to each block of memory that is present and protected.
//
// usage: firstwrite BLOCKS BYTES_PER_BLOCK SEED thread|direct
//
//   thread  a handler thread reads the message and takes the protection of the block away, which wakes the writer.
//   direct  the writer does that itself, in the handler of SIGBUS.
//
// Prints one JSON object, with the median (ns). Pinning is the caller's business.
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>

#include "touch.h"
#include "uffd.h"

static int fd;
static size_t block;

static void unprotect(uint64_t address)
{
	struct uffd_writeprotect off = { .start = address & ~(uint64_t)(block - 1), .len = block };
	while (ioctl(fd, UFFD_WRITEPROTECT_IOCTL, &off))
		if (errno != EAGAIN)
			die("UFFDIO_WRITEPROTECT");
}

static void *serve(void *arg)
{
	struct uffd_msg messages[16];
	for (;;) {
		ssize_t got = read(fd, messages, sizeof(messages));
		if (got < 0)
			die("read");
		for (size_t i = 0; i < (size_t)got / sizeof(messages[0]); i++)
			unprotect(messages[i].address);
	}
	return arg;
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	int saved = errno;
	unprotect((uintptr_t)info->si_addr);
	errno = saved;
}

int main(int argc, char **argv)
{
	if (argc < 5) {
		fprintf(stderr, "usage: firstwrite BLOCKS BYTES_PER_BLOCK SEED thread|direct\n");
		return 2;
	}
	size_t blocks = strtoull(argv[1], NULL, 0);
	block = strtoull(argv[2], NULL, 0);
	int direct = !strcmp(argv[4], "direct");
	size_t bytes = blocks * block;
	char *source = map_aligned(bytes), *region = map_aligned(bytes);
	memset(source, 7, bytes);
	fd = uffd_open(O_CLOEXEC, direct ? UFFD_FEATURE_SIGBUS : 0);
	uffd_register(fd, region, bytes, UFFD_REGISTER_MISSING | UFFD_REGISTER_WP);
	for (size_t done = 0; done < bytes;) {
		struct uffd_fill copy = {
			.dst = (uintptr_t)region + done,
			.src = (uintptr_t)source + done,
			.len = bytes - done,
			.mode = UFFD_COPY_WP,
		};
		if (!ioctl(fd, UFFD_COPY_IOCTL, &copy))
			break;
		if (errno != EAGAIN)
			die("UFFDIO_COPY");
		done += copy.done > 0 ? (size_t)copy.done : 0;
	}
	pthread_t thread;
	struct sigaction action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO };
	sigfillset(&action.sa_mask);
	if (direct ? sigaction(SIGBUS, &action, NULL) : pthread_create(&thread, NULL, serve, NULL))
		die("handler");

	struct touch_result result;
	if (touch_pages(region, blocks, block, strtoull(argv[3], NULL, 0), 1, &result))
		die("malloc");
	if (result.checksum != blocks * 0x0707070707070707u) {
		fprintf(stderr, "wrong bytes: checksum differs\n");
		return 1;
	}
	printf("{\"value\": %.0f, \"mean\": %.0f, \"p99\": %.0f}\n", result.p50_ns, result.mean_ns, result.p99_ns);
	return 0;
}
