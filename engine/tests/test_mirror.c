// SPDX-License-Identifier: Apache-2.0
// Tracking of accesses by moving pages away: every access is in a report, no other page is, and no byte is ever wrong.
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "mirror.h"
#include "support.h"

enum { PAGE = 4096 };

static uint8_t *area_of(uint64_t pages)
{
	// Neighbours that the kernel joins with it, as with real arrays.
	uint8_t *p = mmap(NULL, (pages + 2) * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(p != MAP_FAILED);
	return p + PAGE;
}

static void area_free(uint8_t *p, uint64_t pages)
{
	CHECK(munmap(p - PAGE, (pages + 2) * PAGE) == 0);
}

static struct uf_span span(const uint8_t *p, uint64_t pages)
{
	return (struct uf_span){(uintptr_t)p, (uintptr_t)p + pages * PAGE};
}

static void begin(const uint8_t *p, uint64_t pages)
{
	struct uf_span s = span(p, pages);
	int err = uf_mirror_begin(&s, 1);
	CHECK(err == 0, "%s", strerror(-err));
}

static void end(const uint8_t *p, uint64_t pages)
{
	struct uf_span s = span(p, pages);
	CHECK(uf_mirror_end(&s, 1) == 0);
}

// One byte for each page: what was found.
static void collect(const uint8_t *p, uint64_t pages, bool rearm, uint8_t *what)
{
	struct uf_span s = span(p, pages);
	struct uf_found *found;
	size_t n;
	int err = uf_mirror_collect(&s, 1, rearm, &found, &n);
	CHECK(err == 0, "%s", strerror(-err));
	memset(what, 0, pages);
	for (size_t i = 0; i < n; i++) {
		CHECK(found[i].start >= s.start && found[i].end <= s.end && found[i].start < found[i].end && found[i].what < 8);
		for (uint64_t a = found[i].start; a < found[i].end; a += PAGE) {
			CHECK(!what[(a - s.start) / PAGE], "told twice");
			what[(a - s.start) / PAGE] = (uint8_t)found[i].what;
		}
	}
	free(found);
}

static void expect(const uint8_t *p, uint64_t pages, bool rearm, const uint8_t *want, const char *when)
{
	uint8_t *what = malloc(pages);
	collect(p, pages, rearm, what);
	for (uint64_t i = 0; i < pages; i++)
		CHECK(what[i] == want[i], "%s: page %llu: %d, not %d", when, (unsigned long long)i, what[i], want[i]);
	free(what);
}

static void stamp(uint8_t *p, uint64_t pages)
{
	for (uint64_t i = 0; i < pages; i++)
		*(uint64_t *)(p + i * PAGE + 64) = i * 0x9e3779b97f4a7c15ULL + 1;
}

static bool stamped(const uint8_t *p, uint64_t i)
{
	return *(const volatile uint64_t *)(p + i * PAGE + 64) == i * 0x9e3779b97f4a7c15ULL + 1;
}

enum { R = UF_FOUND_ACCESSED, W = UF_FOUND_ACCESSED | UF_FOUND_WRITTEN, B = UF_FOUND_BLIND };

// --- what is reported, one access at a time

static void exact(bool huge)
{
	enum { N = 1600 };
	uint8_t *p = area_of(N), want[N] = {0};
	madvise(p, N * PAGE, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	stamp(p, N / 2); // the rest was never populated
	begin(p, N);
	expect(p, N, true, want, "untouched");
	for (int round = 0; round < 5; round++) {
		memset(want, 0, N);
		for (int i = round; i < N; i += 7) {
			want[i] = R;
			CHECK(i < N / 2 ? stamped(p, (uint64_t)i) : p[i * PAGE + 9] == 0, "page %d", i);
		}
		for (int i = 0; i < N; i += 11 + round) {
			want[i] = W;
			p[i * PAGE + 4000] = (uint8_t)round;
		}
		expect(p, N, false, want, "looked at");
		expect(p, N, false, want, "looked at twice");
		expect(p, N, true, want, "taken");
		memset(want, 0, N);
		expect(p, N, false, want, "after it was taken");
	}
	// System calls, and a part of the runs only.
	int fds[2];
	CHECK(pipe(fds) == 0 && write(fds[1], p + 20 * PAGE, 10) == 10 && read(fds[0], p + 30 * PAGE, 10) == 10);
	want[20] = R, want[30] = W;
	expect(p + 20 * PAGE, 1, true, want + 20, "by write");
	want[20] = 0;
	expect(p, N, true, want, "by read");
	close(fds[0]);
	close(fds[1]);
	// The end, in two steps; what was read, written and untouched is all there.
	p[3 * PAGE] = p[5 * PAGE];
	end(p + 100 * PAGE, 200);
	for (int i = 0; i < N / 2; i++)
		CHECK(i >= 290 || i < 110 || stamped(p, (uint64_t)i));
	memset(want, B, N);
	uint8_t what[N];
	collect(p, N, true, what);
	for (int i = 0; i < N; i++)
		CHECK((what[i] == B) == (i >= 100 && i < 300), "page %d: %d", i, what[i]);
	begin(p + 100 * PAGE, 200);
	end(p, N);
	for (int i = 0; i < N / 2; i++)
		CHECK(stamped(p, (uint64_t)i));
	CHECK(test_threads_left(test_base_threads()), "the thread outlives its work");
	area_free(p, N);
}

// --- many threads, all of them checked against the reports

enum { PAGES = 512, THREADS = 6, KEEP = 64, QUIET = 32 };

static struct {
	uint8_t *p;
	atomic_ulong epoch; // odd while a report is made
	_Atomic uint8_t report[KEEP][PAGES];
	atomic_ulong checked;
} s;

// Pages [0, QUIET) are never touched, [QUIET, 2 * QUIET) only read, the rest belong to one thread each, which counts in them; all
// threads read all.
static void worker(struct test_crowd *c, int number)
{
	struct {
		unsigned long epoch;
		int page, kind;
	} log[256];
	uint64_t random = (uint64_t)number * 77 + 5, counter[PAGES] = {0};
	int n = 0;
	unsigned long last = 0;
	while (!atomic_load(&c->stop)) {
		int page = QUIET + (int)(test_random(&random) % (PAGES - QUIET));
		volatile uint64_t *word = (void *)(s.p + page * PAGE + (page * 8) % PAGE);
		bool mine = page >= 2 * QUIET && page % THREADS == number;
		int kind = mine && test_random(&random) % 2 ? W : R;
		unsigned long before = atomic_load(&s.epoch);
		if (mine) {
			CHECK(*word == counter[page], "page %d: %llu, not %llu", page, (unsigned long long)*word,
			      (unsigned long long)counter[page]);
			if (kind == W)
				__atomic_store_n(word, ++counter[page], __ATOMIC_RELAXED);
		} else {
			uint64_t now = __atomic_load_n(word, __ATOMIC_RELAXED);
			CHECK(page >= 2 * QUIET || now == (uint64_t)page + 1, "page %d", page);
		}
		unsigned long after = atomic_load(&s.epoch);
		if (before == after && !(before & 1) && n < 256)
			log[n].epoch = before, log[n].page = page, log[n++].kind = kind;
		if (after / 2 == last)
			continue;
		last = after / 2;
		for (int i = 0; i < n;) {
			if (log[i].epoch / 2 >= last) {
				i++;
				continue;
			}
			uint8_t told = atomic_load(&s.report[log[i].epoch / 2 % KEEP][log[i].page]);
			// While we looked the report may have been overwritten.
			if (atomic_load(&s.epoch) / 2 - log[i].epoch / 2 < KEEP - 1) {
				CHECK((told & log[i].kind) == log[i].kind, "page %d, epoch %lu: %d lacks %d", log[i].page,
				      log[i].epoch, told, log[i].kind);
				atomic_fetch_add(&s.checked, 1);
			}
			log[i] = log[--n];
		}
		atomic_fetch_add(&c->work, 1);
	}
}

static void nothing_lost(bool in_pieces)
{
	static struct test_crowd c;
	uint8_t what[PAGES];
	memset(&s, 0, sizeof(s));
	s.p = area_of(PAGES);
	for (int i = 0; i < 2 * QUIET; i++)
		*(uint64_t *)(s.p + i * PAGE + (i * 8) % PAGE) = (uint64_t)i + 1;
	begin(s.p, PAGES);
	test_crowd_start(&c, THREADS, worker, NULL);
	uint64_t random = 99;
	// On one slow processor most rounds see few accesses.
	for (int round = 0; round < test_rounds(1000) || (atomic_load(&s.checked) < 500 && round < 20000); round++) {
		if (round % 3 == 0)
			usleep((useconds_t)(test_random(&random) % 800));
		unsigned long e = atomic_fetch_add(&s.epoch, 1);
		if (round % 7 == 0)
			collect(s.p, PAGES, false, what);
		for (int at = 0, step = in_pieces ? 100 : PAGES; at < PAGES; at += step)
			collect(s.p + at * PAGE, (uint64_t)(at + step > PAGES ? PAGES - at : step), true, what + at);
		for (int i = 0; i < PAGES; i++) {
			CHECK(i >= QUIET || !what[i], "page %d was never touched: %d", i, what[i]);
			CHECK(i >= 2 * QUIET || what[i] != W, "page %d was never written", i);
			CHECK(!(what[i] & B), "page %d is blind", i);
			atomic_store(&s.report[e / 2 % KEEP][i], what[i]);
		}
		atomic_fetch_add(&s.epoch, 1);
	}
	test_crowd_stop(&c, "accesses");
	end(s.p, PAGES);
	for (int i = 0; i < 2 * QUIET; i++)
		CHECK(*(uint64_t *)(s.p + i * PAGE + (i * 8) % PAGE) == (uint64_t)i + 1);
	CHECK(atomic_load(&s.checked) >= 500, "%lu accesses checked", atomic_load(&s.checked));
	printf("  %lu accesses found in their reports\n", atomic_load(&s.checked));
	area_free(s.p, PAGES);
}

static void counting(struct test_crowd *c, int number)
{
	uint64_t random = (uint64_t)number + 9, counter[PAGES] = {0};
	while (!atomic_load(&c->stop)) {
		int page = (int)(test_random(&random) % PAGES);
		volatile uint64_t *word = (void *)(s.p + page * PAGE + number * 8);
		CHECK(*word == counter[page], "page %d: %llu, not %llu", page, (unsigned long long)*word,
		      (unsigned long long)counter[page]);
		*word = ++counter[page];
		atomic_fetch_add_explicit(&c->work, 1, memory_order_relaxed);
	}
}

// Beginning and ending under threads that go on; parts of it, too.
static void begins_and_ends(void)
{
	static struct test_crowd c;
	s.p = area_of(PAGES);
	test_crowd_start(&c, THREADS, counting, NULL);
	uint8_t what[PAGES];
	for (int round = 0; round < test_rounds(300); round++) {
		begin(s.p, PAGES);
		if (round % 2)
			collect(s.p, PAGES, true, what);
		test_crowd_work(&c, 100, "while it is watched");
		if (round % 3 == 0)
			end(s.p + 64 * PAGE, 100);
		end(s.p, PAGES);
	}
	test_crowd_stop(&c, "counts");
	area_free(s.p, PAGES);
}

// --- fork

static void child_right(uint8_t *p, int n, const uint8_t *plain)
{
	for (int i = 0; i < n; i++)
		CHECK(plain[i] ? p[i * PAGE] == plain[i] : stamped(p, (uint64_t)i), "child: page %d", i);
	memset(p, 1, (size_t)n * PAGE);
}

static void forks(bool alive, bool huge)
{
	enum { N = 2000 };
	uint8_t *p = area_of(N), want[N] = {0}, none[N] = {0};
	madvise(p, N * PAGE, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	stamp(p, N);
	begin(p, N);
	for (int round = 0; round < 4; round++) {
		memset(want, 0, N);
		for (int i = 0; i < N / 2; i += 3 + round)
			want[i] = R, stamped(p, (uint64_t)i);
		for (int i = 1; i < N / 2; i += 5 + round)
			want[i] = W, p[i * PAGE + 8] = 3;
		int fds[2];
		CHECK(pipe(fds) == 0);
		pid_t pid = fork();
		CHECK(pid >= 0);
		if (!pid) {
			close(fds[1]);
			child_right(p, N, none);
			CHECK(test_thread_count() == 1 || TEST_TSAN || TEST_ASAN);
			if (!TEST_TSAN) { // which dies where a thread's place in memory is used again after a fork
				begin(p, N);
				p[7 * PAGE]++;
				memset(want, 0, N);
				want[7] = W;
				expect(p, N, true, want, "in a child that watches anew");
				end(p, N);
			}
			char byte;
			_exit(read(fds[0], &byte, 1) != 0);
		}
		close(fds[0]);
		int status;
		if (!alive) {
			close(fds[1]);
			CHECK(waitpid(pid, &status, 0) == pid && status == 0, "status %d", status);
		}
		for (int i = N / 2; i < N; i += 4) {
			want[i] = R;
			CHECK(stamped(p, (uint64_t)i), "parent: page %d", i);
		}
		for (int i = N / 2 + 1; i < N; i += 6)
			want[i] = W, p[i * PAGE + 8] = 4;
		expect(p, N, true, want, "across a fork");
		memset(want, 0, N);
		want[0] = R, want[1] = W, want[N - 1] = R;
		CHECK(stamped(p, 0) && stamped(p, N - 1));
		p[PAGE + 9]++;
		expect(p, N, true, want, "after a fork");
		if (alive) {
			close(fds[1]);
			CHECK(waitpid(pid, &status, 0) == pid && status == 0, "status %d", status);
		}
	}
	end(p, N);
	for (int i = 0; i < N; i++)
		CHECK(stamped(p, (uint64_t)i));
	area_free(p, N);
}

static void forking(struct test_crowd *c, int number)
{
	(void)number;
	while (!atomic_load(&c->stop)) {
		pid_t pid = fork();
		CHECK(pid >= 0);
		if (!pid) {
			alarm(30);
			for (int i = 0; i < 2 * QUIET; i++)
				if (*(uint64_t *)(s.p + i * PAGE + (i * 8) % PAGE) != (uint64_t)i + 1)
					_exit(3);
			_exit(0);
		}
		int status;
		CHECK(waitpid(pid, &status, 0) == pid && status == 0, "status %d", status);
		atomic_fetch_add(&c->work, 1);
	}
}

static void forks_meanwhile(void)
{
	static struct test_crowd c, f;
	uint8_t what[PAGES];
	memset(&s, 0, sizeof(s));
	s.p = area_of(PAGES);
	for (int i = 0; i < 2 * QUIET; i++)
		*(uint64_t *)(s.p + i * PAGE + (i * 8) % PAGE) = (uint64_t)i + 1;
	begin(s.p, PAGES);
	test_crowd_start(&c, 3, worker, NULL);
	test_crowd_start(&f, 1, forking, NULL);
	for (int round = 0; round < test_rounds(300); round++) {
		unsigned long e = atomic_fetch_add(&s.epoch, 1);
		collect(s.p, PAGES, true, what);
		for (int i = 0; i < PAGES; i++) {
			CHECK(i >= QUIET || !what[i], "page %d was never touched: %d", i, what[i]);
			CHECK(i >= 2 * QUIET || what[i] != W, "page %d was never written", i);
			// A page that a child took between our two attempts.
			atomic_store(&s.report[e / 2 % KEEP][i], what[i] & B ? W : what[i]);
		}
		atomic_fetch_add(&s.epoch, 1);
		usleep(500);
	}
	test_crowd_stop(&f, "forks");
	test_crowd_stop(&c, "accesses");
	end(s.p, PAGES);
	area_free(s.p, PAGES);
}

// The C library's own data lies beside the array, and a fork uses it in the child.
static void heap(void)
{
	enum { N = 24 * PAGE };
	for (int round = 0; round < 20; round++) {
		char *pieces[64];
		for (int i = 0; i < 64; i++)
			pieces[i] = malloc(500);
		// The list of open files is gone through in the child before anything of ours runs there. Without neighbours that
		// malloc needs meanwhile.
		uint8_t *before = malloc(3 * PAGE);
		FILE *file = fopen("/dev/null", "w");
		uint8_t *after = malloc(3 * PAGE), *array = malloc(N);
		CHECK(before && file && after && array);
		memset(array, 7, N);
		bool beside = before < (uint8_t *)file && (uint8_t *)file < after && after < array && array < before + 2 * N;
		uint8_t *first = (uint8_t *)((uintptr_t)(beside ? before : array) & ~(uintptr_t)(PAGE - 1)), *last = array + N;
		uint64_t pages = (uint64_t)(last - first + PAGE - 1) / PAGE;
		begin(first, pages);
		CHECK(array[5 * PAGE] == 7);
		pid_t pid = fork();
		if (!pid) {
			alarm(30);
			void *more = malloc(1000);
			for (int i = 0; i < N; i++)
				if (array[i] != 7)
					_exit(4);
			fprintf(file, "child\n");
			fclose(file);
			for (int i = 0; i < 64; i++)
				free(pieces[i]);
			free(more);
			_exit(0);
		}
		int status;
		CHECK(waitpid(pid, &status, 0) == pid && status == 0, "status %d", status);
		uint8_t what[128];
		collect(first, pages, true, what);
		CHECK(what[(array + 5 * PAGE - first) / PAGE] & (R | B));
		for (int i = 0; i < 64; i++)
			free(pieces[i]);
		fclose(file);
		collect(first, pages, true, what);
		array[8 * PAGE] = 9;
		collect(first, pages, true, what);
		CHECK(what[(array + 8 * PAGE - first) / PAGE] == W, "%d", what[(array + 8 * PAGE - first) / PAGE]);
		end(first, pages);
		CHECK(array[8 * PAGE] == 9 && array[7 * PAGE] == 7);
		free(array);
		free(before);
		free(after);
	}
}

// --- what other code does with the memory

static void dropped_and_unmapped(void)
{
	enum { N = 128 };
	uint8_t *p = area_of(N), what[N];
	for (int round = 0; round < 20; round++) {
		stamp(p, N);
		begin(p, N);
		stamped(p, 1);
		p[2 * PAGE] = 1;
		CHECK(madvise(p, 8 * PAGE, MADV_DONTNEED) == 0);
		for (int i = 0; i < 8; i++)
			CHECK(*(uint64_t *)(p + i * PAGE + 64) == 0, "page %d has old bytes", i);
		CHECK(madvise(p + 8 * PAGE, 8 * PAGE, MADV_DONTNEED) == 0);
		collect(p, N, true, what);
		CHECK(what[0] == R && what[1] == R && what[2] == W && what[3] == R && what[20] == 0, "%d %d", what[0], what[2]);
		for (int i = 0; i < 16; i++)
			CHECK(*(uint64_t *)(p + i * PAGE + 64) == 0, "page %d has old bytes", i);
		for (int i = 16; i < N; i++)
			CHECK(stamped(p, (uint64_t)i));
		end(p, N);
	}
	// Written, given up, written again: nothing is lost of the latter.
	stamp(p, N);
	begin(p, N);
	p[PAGE] = 1;
	CHECK(madvise(p, 4 * PAGE, MADV_FREE) == 0);
	p[PAGE] = 2;
	collect(p, N, true, what);
	collect(p, N, true, what);
	CHECK(p[PAGE] == 2);
	end(p, N);
	CHECK(p[PAGE] == 2);
	area_free(p, N);

	p = area_of(2 * N); // its first half is elsewhere: what may be dropped at any time is blind for a while
	stamp(p, N);
	begin(p, N);
	CHECK(stamped(p, 40));
	CHECK(munmap(p + 32 * PAGE, 16 * PAGE) == 0);
	// Others may get the addresses: not ours any more.
	CHECK(mmap(p + 36 * PAGE, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == p + 36 * PAGE);
	p[36 * PAGE] = 42;
	collect(p, N, true, what);
	for (int i = 0; i < N; i++)
		CHECK(what[i] == (i >= 32 && i < 48 ? B : 0), "page %d: %d", i, what[i]);
	CHECK(p[36 * PAGE] == 42);
	uint8_t *q = mremap(p + 64 * PAGE, 32 * PAGE, 64 * PAGE, MREMAP_MAYMOVE);
	CHECK(q != MAP_FAILED && q != p + 64 * PAGE);
	for (int i = 0; i < 32; i++)
		CHECK(stamped(q - 64 * PAGE, 64 + (uint64_t)i), "moved page %d", i);
	CHECK(q[40 * PAGE] == 0);
	collect(p, N, true, what);
	CHECK(what[64] == B && what[95] == B && what[96] == 0);
	CHECK(mprotect(p + 100 * PAGE, 4 * PAGE, PROT_READ) == 0);
	CHECK(stamped(p, 100) && stamped(p, 99) && stamped(p, 104));
	collect(p, N, true, what);
	CHECK(what[100] == R && what[99] == R && what[104] == R && what[101] == 0 && what[98] == 0);
	collect(p, N, true, what);
	CHECK(what[100] == B && what[99] == 0, "%d", what[100]);
	end(p, N);
	for (int i = 0; i < N; i++)
		if ((i < 32 || i >= 48) && (i < 64 || i >= 96))
			CHECK(stamped(p, (uint64_t)i), "page %d", i);
	munmap(q, 64 * PAGE);
	area_free(p, 2 * N);
}

static void unmapping(struct test_crowd *c, int number)
{
	uint8_t *p = s.p + number * 64 * PAGE;
	uint64_t random = (uint64_t)number + 3;
	for (unsigned round = 1; !atomic_load(&c->stop); round++) {
		int at = (int)(test_random(&random) % 60), n = 1 + (int)(test_random(&random) % 4);
		memset(p + at * PAGE, (int)(round % 255), (size_t)n * PAGE);
		if (round % 2) {
			CHECK(madvise(p + at * PAGE, (size_t)n * PAGE, MADV_DONTNEED) == 0);
		} else {
			CHECK(mmap(p + at * PAGE, (size_t)n * PAGE, PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == p + at * PAGE);
		}
		for (int i = 0; i < n; i++)
			CHECK(p[(at + i) * PAGE + 70] == 0, "old bytes");
		p[at * PAGE] = (uint8_t)round;
		usleep((useconds_t)(test_random(&random) % 200));
		CHECK(p[at * PAGE] == (uint8_t)round && p[at * PAGE + 1] == 0);
		atomic_fetch_add(&c->work, 1);
	}
}

static void dropped_meanwhile(void)
{
	static struct test_crowd c;
	uint8_t what[PAGES];
	s.p = area_of(PAGES);
	test_crowd_start(&c, 4, unmapping, NULL);
	for (int round = 0; round < test_rounds(50); round++) {
		begin(s.p, PAGES);
		for (int i = 0; i < 5; i++)
			collect(s.p, PAGES, true, what);
		end(s.p, PAGES);
	}
	test_crowd_stop(&c, "drops and unmaps");
	area_free(s.p, PAGES);
}

static void *dropping(void *at)
{
	CHECK(madvise(at, 4096 * PAGE, MADV_DONTNEED) == 0);
	return NULL;
}

// Pages must not be taken away between the message that they will be dropped and the moment when they are: they would come back.
static void dropped_slowly(void)
{
	enum { N = 4096, LAST = 32 };
	uint8_t *p = area_of(N), what[LAST];
	begin(p, N);
	for (int round = 0; round < test_rounds(12); round++) {
		memset(p, 9, N * PAGE);
		pthread_t thread;
		CHECK(pthread_create(&thread, NULL, dropping, p) == 0);
		while (pthread_tryjoin_np(thread, NULL))
			collect(p + (N - LAST) * PAGE, LAST, true, what);
		for (int i = N - LAST; i < N; i++)
			CHECK(p[i * PAGE] == 0, "page %d has old bytes", i);
	}
	end(p, N);
	area_free(p, N);
}

// --- pages that a device holds

static void pinned(void)
{
	enum { N = 16 };
	struct io_uring_params params = {0};
	int ring = (int)syscall(SYS_io_uring_setup, 4, &params);
	if (ring < 0) {
		printf("  no io_uring here: %s\n", strerror(errno));
		return;
	}
	uint8_t *p = area_of(N), what[N];
	stamp(p, N);
	struct iovec buffer = {p + 4 * PAGE, 2 * PAGE};
	CHECK(syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &buffer, 1) == 0, "%s", strerror(errno));
	begin(p, N);
	CHECK(stamped(p, 4) && stamped(p, 8));
	collect(p, N, true, what);
	for (int i = 0; i < N; i++)
		CHECK(what[i] == (i == 4 || i == 5 ? B : i == 8 ? R : 0), "page %d: %d", i, what[i]);
	CHECK(syscall(SYS_io_uring_register, ring, IORING_UNREGISTER_BUFFERS, NULL, 0) == 0);
	close(ring);
	// The kernel lets go a little later.
	bool free_again = false;
	for (int i = 0; i < 2000 && !free_again; i++) {
		usleep(1000);
		collect(p, N, true, what);
		free_again = !what[4] && !what[5];
	}
	CHECK(free_again, "blind for ever");
	p[5 * PAGE] = 1;
	collect(p, N, true, what);
	CHECK(what[5] == W && what[4] == 0);
	end(p, N);
	area_free(p, N);
}

static void refused(void)
{
	uint8_t *p = area_of(8);
	struct uf_span all = span(p, 8), odd = {all.start + 1, all.end}, two[] = {span(p, 2), span(p, 8)};
	CHECK(uf_mirror_begin(&odd, 1) == -EINVAL);
	CHECK(uf_mirror_begin(two, 2) == -EEXIST);
	stamp(p, 8);
	CHECK(mprotect(p + 4 * PAGE, PAGE, PROT_READ) == 0);
	CHECK(uf_mirror_begin(&all, 1) == -EINVAL);
	for (int i = 0; i < 8; i++)
		CHECK(stamped(p, (uint64_t)i));
	CHECK(mprotect(p + 4 * PAGE, PAGE, PROT_READ | PROT_WRITE) == 0);
	if (syscall(SYS_mlock, p + 2 * PAGE, PAGE) == 0) // sanitizers leave out mlock()
		CHECK(uf_mirror_begin(&all, 1) == -EINVAL);
	CHECK(syscall(SYS_munlock, p + 2 * PAGE, PAGE) == 0);
	uint8_t *shared = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	stamp(shared, 8);
	struct uf_span foreign = span(shared, 8);
	CHECK(uf_mirror_begin(&foreign, 1) == -EINVAL);
	CHECK(stamped(shared, 7));
	munmap(shared, 8 * PAGE);
	struct uf_span nothing = {0x10000, 0x20000};
	CHECK(uf_mirror_begin(&nothing, 1) < 0, "unmapped");
	int fd = open("/proc/self/exe", O_RDONLY);
	uint8_t *file = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	struct uf_span of_file = span(file, 2);
	CHECK(uf_mirror_begin(&of_file, 1) == -EINVAL);
	munmap(file, 2 * PAGE);
	close(fd);
	for (int i = 0; i < 8; i++)
		CHECK(stamped(p, (uint64_t)i));
	CHECK(uf_mirror_begin(&all, 1) == 0 && uf_mirror_begin(&all, 1) == -EEXIST);
	struct uf_mirror_stats stats;
	CHECK(stamped(p, 3));
	uf_mirror_stats(&stats);
	CHECK(stats.pages == 8 && stats.reads == 1 && stats.writes == 0 && stats.upgrades == 0, "%d %d %d %d", (int)stats.pages,
	      (int)stats.reads, (int)stats.writes, (int)stats.upgrades);
	end(p, 8);
	end(p, 8);
	uf_mirror_stats(&stats);
	CHECK(stats.pages == 0);
	area_free(p, 8);
}

int main(int argc, char **argv)
{
	test_start(argc, argv);
	test_needs_userfaultfd();
	const struct uf_host *h = uf_host_probe();
	if (!h->move || h->open_via == 3) {
		printf("no UFFDIO_MOVE here, or no faults of the kernel\n");
		return 77;
	}
	const char *only = argc > 1 ? argv[1] : NULL;
	int fds = test_fd_count();
	if (RUN("exact"))
		exact(false);
	if (RUN("huge"))
		exact(true);
	if (RUN("refused"))
		refused();
	if (RUN("dropped"))
		dropped_and_unmapped();
	if (RUN("dropped-slowly"))
		dropped_slowly();
	if (RUN("pinned"))
		pinned();
	if (RUN("heap"))
		heap();
	if (RUN("fork"))
		forks(false, false);
	if (RUN("fork-alive"))
		forks(true, false);
	if (RUN("fork-huge")) {
		forks(false, true);
		forks(true, true);
	}
	if (RUN("lost"))
		nothing_lost(false);
	if (RUN("lost-in-pieces"))
		nothing_lost(true);
	if (RUN("ends"))
		begins_and_ends();
	if (RUN("dropped-meanwhile"))
		dropped_meanwhile();
	if (RUN("forks-meanwhile"))
		forks_meanwhile();
	CHECK(test_threads_left(test_base_threads()));
	CHECK(test_fd_count() == fds || fds + 1 == test_fd_count(), "%d descriptors, %d before", test_fd_count(), fds);
	return 0;
}
