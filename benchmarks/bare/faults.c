// Bare handler loop: random missing faults, one page each, served from memory by UFFDIO_COPY.
//
// usage: faults PAGES SEED [read|poll] [thread|process|elsewhere]
//
// The handler is a thread, or a forked process: its requests act on the memory of whoever created the userfaultfd.
//
// Prints one JSON object. Pinning is the caller's business (the affinity is inherited): pinned to one CPU, the
// handler runs where the fault happened, which is the fastest arrangement there is for a handler thread. With
// `elsewhere` it is a thread that pins itself to another CPU than the faulting thread's.
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>

#include "touch.h"
#include "uffd.h"

struct handler {
	int fd;
	int wait_with_poll;
	int elsewhere;
	size_t page_size;
	char *region;
	const char *source;
};

static void leave_cpu(int cpu)
{
	for (int other = 0; other < sysconf(_SC_NPROCESSORS_CONF); other++) {
		cpu_set_t set;
		CPU_ZERO(&set);
		CPU_SET(other, &set);
		if (other != cpu && !sched_setaffinity(0, sizeof(set), &set))
			return;
	}
	die("no other CPU");
}

// The thread ends with the process: it is blocked in read or poll when main returns.
static void *serve(void *arg)
{
	const struct handler *h = arg;
	struct uffd_msg messages[16];
	if (h->elsewhere)
		leave_cpu(sched_getcpu());
	for (;;) {
		if (h->wait_with_poll) {
			struct pollfd wait = { .fd = h->fd, .events = POLLIN };
			if (poll(&wait, 1, -1) < 0)
				die("poll");
		}
		ssize_t got = read(h->fd, messages, sizeof(messages));
		if (got < 0) {
			if (errno == EAGAIN)
				continue;
			die("read");
		}
		for (size_t i = 0; i < (size_t)got / sizeof(messages[0]); i++) {
			if (messages[i].event != UFFD_EVENT_PAGEFAULT)
				continue;
			uint64_t page = messages[i].address & ~(uint64_t)(h->page_size - 1);
			struct uffd_fill copy = {
				.dst = page,
				.src = (uintptr_t)h->source + (page - (uintptr_t)h->region),
				.len = h->page_size,
			};
			if (ioctl(h->fd, UFFD_COPY_IOCTL, &copy) && errno != EEXIST)
				die("UFFDIO_COPY");
		}
	}
	return NULL;
}

int main(int argc, char **argv)
{
	if (argc < 3) {
		fprintf(stderr, "usage: faults PAGES SEED [read|poll] [thread|process|elsewhere]\n");
		return 2;
	}
	size_t pages = strtoull(argv[1], NULL, 0);
	uint64_t seed = strtoull(argv[2], NULL, 0);
	int wait_with_poll = argc > 3 && !strcmp(argv[3], "poll");
	int in_process = argc > 4 && !strcmp(argv[4], "process");
	size_t page_size = (size_t)sysconf(_SC_PAGESIZE);

	char *source = map_aligned(pages * page_size);
	uint64_t expected = 0;
	for (size_t i = 0; i < pages; i++) {
		memset(source + i * page_size, (int)i, page_size);
		uint64_t word = (i + 1) * 0x9e3779b97f4a7c15u;
		memcpy(source + i * page_size, &word, sizeof(word));
		expected += word;
	}

	// Static: the handler thread may still look at it when main has returned.
	static struct handler handler;
	handler = (struct handler){
		.fd = uffd_open(O_CLOEXEC | (wait_with_poll ? O_NONBLOCK : 0), 0),
		.wait_with_poll = wait_with_poll,
		.elsewhere = argc > 4 && !strcmp(argv[4], "elsewhere"),
		.page_size = page_size,
		.region = map_aligned(pages * page_size),
		.source = source,
	};
	uffd_register(handler.fd, handler.region, pages * page_size, UFFD_REGISTER_MISSING);
	pthread_t thread;
	if (in_process) {
		pid_t pid = fork();
		if (pid < 0)
			die("fork");
		if (!pid) {
			prctl(PR_SET_PDEATHSIG, SIGKILL); // it waits in read when main returns
			serve(&handler);
		}
	} else if (pthread_create(&thread, NULL, serve, &handler)) {
		die("pthread_create");
	}

	struct touch_result result;
	if (touch_pages(handler.region, pages, page_size, seed, 0, &result))
		die("malloc");
	if (result.checksum != expected) {
		fprintf(stderr, "wrong bytes: checksum differs\n");
		return 1;
	}
	// The median: the mean also counts whatever else the machine ran on this CPU meanwhile.
	printf("{\"value\": %.0f, \"mean\": %.0f, \"p99\": %.0f}\n", result.p50_ns, result.mean_ns, result.p99_ns);
	return 0;
}
