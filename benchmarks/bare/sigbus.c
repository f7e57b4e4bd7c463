// Bare SIGBUS loop: random missing faults, one page each, served from memory by the faulting thread itself.
//
// usage: sigbus PAGES SEED [THREADS [one]]
//
// UFFD_FEATURE_SIGBUS makes the fault a signal on the thread that made it; its handler calls UFFDIO_COPY. Without THREADS
// one thread faults where it is, and the median is printed (ns); with THREADS each has a region of PAGES pages and a
// userfaultfd of its own, is pinned to a CPU of its own, and the throughput of all is printed (faults per µs). With `one`
// they share one region, and run anywhere.
#define _GNU_SOURCE
#include <signal.h>

#include "threads.h"
#include "touch.h"
#include "uffd.h"

enum { MOST = 64 };

static struct {
	int fd;
	char *start, *end;
} regions[MOST];
static unsigned nregions;
static const char *source;
static size_t page_size;

static void on_sigbus(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	int saved = errno;
	char *address = info->si_addr;
	for (unsigned i = 0; i < nregions; i++) {
		if (address < regions[i].start || address >= regions[i].end)
			continue;
		uint64_t page = (uintptr_t)address & ~(uint64_t)(page_size - 1);
		struct uffd_fill copy = {
			.dst = page,
			.src = (uintptr_t)source + (page - (uintptr_t)regions[i].start),
			.len = page_size,
		};
		if (ioctl(regions[i].fd, UFFD_COPY_IOCTL, &copy) && errno != EEXIST && errno != EAGAIN)
			die("UFFDIO_COPY");
		errno = saved;
		return;
	}
	signal(SIGBUS, SIG_DFL); // a real one: the instruction is tried again
}

int main(int argc, char **argv)
{
	if (argc < 3 || (argc > 3 && (atoi(argv[3]) < 1 || atoi(argv[3]) > MOST))) {
		fprintf(stderr, "usage: sigbus PAGES SEED [THREADS [one]]\n");
		return 2;
	}
	size_t pages = strtoull(argv[1], NULL, 0);
	uint64_t seed = strtoull(argv[2], NULL, 0), expected = 0;
	page_size = (size_t)sysconf(_SC_PAGESIZE);
	char *bytes = map_aligned(pages * page_size);
	for (size_t i = 0; i < pages; i++) {
		memset(bytes + i * page_size, (int)i, page_size);
		uint64_t word = (i + 1) * 0x9e3779b97f4a7c15u;
		memcpy(bytes + i * page_size, &word, sizeof(word));
		expected += word;
	}
	source = bytes;
	char *bases[MOST];
	unsigned threads = argc > 3 ? (unsigned)atoi(argv[3]) : 0;
	unsigned memories = threads && argc == 4 ? threads : 1;
	for (unsigned i = 0; i < memories; i++) {
		bases[i] = map_aligned(pages * page_size);
		regions[i].start = bases[i];
		regions[i].end = bases[i] + pages * page_size;
		regions[i].fd = uffd_open(O_CLOEXEC, UFFD_FEATURE_SIGBUS);
		uffd_register(regions[i].fd, bases[i], pages * page_size, UFFD_REGISTER_MISSING);
		nregions++;
	}
	struct sigaction action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO };
	sigfillset(&action.sa_mask);
	if (sigaction(SIGBUS, &action, NULL))
		die("sigaction");

	uint64_t checksum;
	if (threads) {
		struct threads_plan plan = {
			.threads = threads,
			.memories = memories,
			.bases = bases,
			.pages = pages,
			.page_size = page_size,
			.seed = seed,
			.cpus = argc == 4 ? (uint32_t)sysconf(_SC_NPROCESSORS_ONLN) : 0,
		};
		struct threads_result result;
		if (threads_touch(&plan, &result))
			die("threads");
		checksum = result.checksum;
		expected *= memories;
		printf("{\"value\": %.6f}\n", (double)(memories * pages) / (double)result.elapsed_ns * 1e3);
	} else {
		struct touch_result result;
		if (touch_pages(bases[0], pages, page_size, seed, 0, &result))
			die("malloc");
		checksum = result.checksum;
		printf("{\"value\": %.0f, \"mean\": %.0f, \"p99\": %.0f}\n", result.p50_ns, result.mean_ns, result.p99_ns);
	}
	if (checksum != expected) {
		fprintf(stderr, "wrong bytes: checksum differs\n");
		return 1;
	}
	return 0;
}
