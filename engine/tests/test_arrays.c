// SPDX-License-Identifier: Apache-2.0
// Memory for large arrays: where it lies, what is told of it, and that nobody gets addresses that somebody may still watch.
#include <errno.h>
#include <sys/mman.h>

#include "arrays.h"
#include "support.h"

enum { KIB = 1024, MIB = 1024 * KIB, LARGE = 64 * KIB, MOST = 4096 };

static struct uf_array_event events[MOST];
static atomic_ulong below_calls;

static void *count_malloc(void *ctx, size_t size)
{
	atomic_fetch_add((atomic_ulong *)ctx, 1);
	return size >> 50 ? NULL : malloc(size); // sanitizers end the program that asks for so much
}

static void *count_calloc(void *ctx, size_t count, size_t size)
{
	atomic_fetch_add((atomic_ulong *)ctx, 1);
	return calloc(count, size);
}

static void *count_realloc(void *ctx, void *ptr, size_t size)
{
	atomic_fetch_add((atomic_ulong *)ctx, 1);
	return realloc(ptr, size);
}

static void count_free(void *ctx, void *ptr, size_t size)
{
	(void)size;
	atomic_fetch_add((atomic_ulong *)ctx, 1);
	free(ptr);
}

static void start(uint64_t most_dead)
{
	struct uf_array_options o = {.threshold = LARGE, .pages = UF_ARRAY_PAGES_HUGE, .most_dead = most_dead,
				     .below = {&below_calls, count_malloc, count_calloc, count_realloc, count_free}};
	CHECK(uf_arrays_start(&o) == 0);
	CHECK(uf_arrays_start(&o) == -EBUSY);
}

static const struct uf_array_allocator *a(void)
{
	return &uf_arrays_handler()->allocator;
}

static void *get(size_t size)
{
	void *ptr = a()->malloc(a()->ctx, size);
	CHECK(ptr, "%zu bytes", size);
	return ptr;
}

static void give(void *ptr, size_t size)
{
	a()->free(a()->ctx, ptr, size);
}

static struct uf_array_stats stats(void)
{
	struct uf_array_stats s;
	uf_arrays_get_stats(&s);
	return s;
}

static bool is_mapped(const void *ptr, size_t size)
{
	static unsigned char in_core[1 << 16];
	CHECK(size / 4096 <= sizeof(in_core));
	return mincore((void *)ptr, size, in_core) == 0;
}

// The one event there is.
static struct uf_array_event told(enum uf_array_event_kind kind, const void *ptr, size_t size)
{
	size_t n = uf_arrays_drain(0, events, MOST);
	CHECK(n == 1, "%zu events", n);
	CHECK(events[0].kind == kind && events[0].address == (uintptr_t)ptr && events[0].nbytes == size, "kind %u, %lu bytes",
	      events[0].kind, events[0].nbytes);
	CHECK(events[0].born_ns && (kind == UF_ARRAY_BORN) == (events[0].died_ns == 0));
	return events[0];
}

static void ends(void *ptr, size_t size)
{
	give(ptr, size);
	told(UF_ARRAY_DIED, ptr, size);
	CHECK(uf_arrays_release((uintptr_t)ptr));
}

// --- the parts

static void places(void)
{
	const size_t sizes[] = {LARGE, LARGE + 1, MIB + 123, 4 * MIB, 9 * MIB + 17};
	start(UINT64_MAX);
	void *small = get(LARGE - 1);
	CHECK(stats().live == 0);
	give(small, LARGE - 1);
	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
		uint8_t *ptr = get(sizes[i]);
		CHECK((uintptr_t)ptr % (sizes[i] >= 4 * MIB ? 2 * MIB : 4096) == 0, "%zu bytes at %p", sizes[i], (void *)ptr);
		memset(ptr, 7, sizes[i]);
		CHECK(stats().live == 1 && stats().live_bytes == sizes[i]);
		told(UF_ARRAY_BORN, ptr, sizes[i]);
		ends(ptr, sizes[i]);
		CHECK(!is_mapped(ptr, sizes[i]));
	}
	CHECK(stats().live == 0 && stats().dead == 0 && stats().brief == 0);
	CHECK(a()->calloc(a()->ctx, SIZE_MAX / 2, 3) == NULL);
	CHECK(a()->malloc(a()->ctx, (size_t)1 << 60) == NULL && stats().failed == 1);
	uf_arrays_stop();
}

// What died while it may be watched keeps its addresses; its pages go if there are too many of them.
static void dead(void)
{
	start(3 * MIB);
	uint8_t *first = get(2 * MIB), *second = get(2 * MIB);
	memset(first, 1, 2 * MIB);
	memset(second, 2, 2 * MIB);
	CHECK(uf_arrays_drain(3600000000000, events, MOST) == 0); // not old enough
	CHECK(uf_arrays_is_young((uintptr_t)first + 2 * MIB - 1) && !uf_arrays_is_young((uintptr_t)&first));
	CHECK(uf_arrays_drain(0, events, 1) == 1 && events[0].address == (uintptr_t)first);
	CHECK(uf_arrays_drain(0, events, MOST) == 1 && events[0].address == (uintptr_t)second);
	CHECK(!uf_arrays_release((uintptr_t)first)); // it lives
	CHECK(!uf_arrays_is_young((uintptr_t)first));
	give(first, 2 * MIB);
	CHECK(first[0] == 1 && first[2 * MIB - 1] == 1);
	CHECK(!uf_arrays_release((uintptr_t)first)); // nobody was told
	give(second, 2 * MIB);
	CHECK(second[0] == 0 && second[2 * MIB - 1] == 0); // above what may lie about
	for (int i = 0; i < 100; i++) {
		uint8_t *other = get(2 * MIB);
		CHECK(other != first && other != second);
		give(other, 2 * MIB);
	}
	CHECK(stats().dead == 2 && stats().dead_bytes == 4 * MIB && stats().brief == 100);
	CHECK(uf_arrays_drain(0, events, MOST) == 2 && events[0].kind == UF_ARRAY_DIED && !events[0].dropped);
	CHECK(events[1].kind == UF_ARRAY_DIED && events[1].dropped);
	CHECK(is_mapped(first, 2 * MIB));
	CHECK(uf_arrays_release((uintptr_t)first) && !uf_arrays_release((uintptr_t)first));
	CHECK(uf_arrays_release((uintptr_t)second) && stats().dead == 0);
	uf_arrays_stop();
}

// Arrays that nobody heard of are served again at once, zeroed where that is asked for, and do not pile up.
static void brief(void)
{
	start(0);
	int before = test_mappings();
	for (int i = 0; i < 1000; i++) {
		size_t size = (size_t)(1 + i % 40) * MIB;
		uint8_t *ptr = get(size);
		ptr[0] = ptr[size - 1] = 9;
		give(ptr, size);
		uint8_t *zero = a()->calloc(a()->ctx, size / 8, 8);
		CHECK(zero && !zero[0] && !zero[size - 1]);
		give(zero, size);
	}
	CHECK(stats().brief == 2000 && stats().brief_most == 40 * MIB && stats().live == 0);
	CHECK(stats().spare_bytes && stats().spare_bytes <= 64 * MIB, "%lu", stats().spare_bytes);
	CHECK(test_mappings() <= before + 40, "%d mappings more", test_mappings() - before);
	CHECK(uf_arrays_drain(0, events, MOST) == 0);
	uf_arrays_stop();
	CHECK(stats().spare_bytes == 0);
}

static void resized(void)
{
	start(UINT64_MAX);
	size_t size = 100;
	uint8_t *ptr = a()->realloc(a()->ctx, NULL, size);
	test_fill(ptr, 0, size);
	for (size_t next; size < 20 * MIB; size = next) { // small, then large
		next = size + size / 2;
		ptr = a()->realloc(a()->ctx, ptr, next);
		CHECK(ptr && test_wrong(ptr, 0, size) == UINT64_MAX, "%zu to %zu bytes", size, next);
		test_fill(ptr, 0, next);
	}
	CHECK(stats().live == 1 && stats().live_bytes == size);
	uint8_t *same = a()->realloc(a()->ctx, ptr, 3 * MIB + 5); // not told of: it shrinks in place
	CHECK(same == ptr && stats().live_bytes == 3 * MIB + 5);
	told(UF_ARRAY_BORN, ptr, 3 * MIB + 5);
	ptr = a()->realloc(a()->ctx, ptr, 2 * MIB); // told of: it moves
	CHECK(ptr != same && test_wrong(ptr, 0, 2 * MIB) == UINT64_MAX);
	CHECK(uf_arrays_drain(0, events, MOST) == 2 && events[0].kind == UF_ARRAY_BORN && events[1].address == (uintptr_t)same);
	CHECK(uf_arrays_release((uintptr_t)same));
	same = ptr;
	ptr = a()->realloc(a()->ctx, ptr, 1000); // small again
	CHECK(test_wrong(ptr, 0, 1000) == UINT64_MAX && stats().live == 0);
	told(UF_ARRAY_DIED, same, 2 * MIB);
	give(ptr, 1000);
	uf_arrays_stop();
	CHECK(stats().dead == 0 && !is_mapped(same, 2 * MIB));
}

// What outlives the recording is served as before; so is everything after it.
static void stopped(void)
{
	start(UINT64_MAX);
	uint8_t *known = get(MIB), *unknown = get(MIB), *dead = get(MIB);
	CHECK(uf_arrays_drain(0, events, MOST) == 3);
	uint8_t *late = get(MIB);
	give(dead, MIB);
	uf_arrays_stop();
	CHECK(!is_mapped(dead, MIB) && stats().dead == 0 && stats().live == 3);
	memset(known, 1, MIB);
	known = a()->realloc(a()->ctx, known, 2 * MIB);
	CHECK(known && known[MIB - 1] == 1 && stats().live == 2);
	give(known, 2 * MIB);
	give(unknown, MIB);
	give(late, MIB);
	CHECK(stats().live == 0 && stats().dead == 0 && stats().spare_bytes == 0);
	CHECK(!is_mapped(unknown, MIB) && !is_mapped(late, MIB));
	unsigned long calls = atomic_load(&below_calls);
	give(get(MIB), MIB);
	CHECK(atomic_load(&below_calls) == calls + 2 && stats().live == 0);
}

static void worker(struct test_crowd *c, int number)
{
	uint64_t seed = (uint64_t)number + 1;
	uint8_t *mine[8] = {0};
	size_t size[8] = {0};
	while (!atomic_load(&c->stop)) {
		unsigned i = (unsigned)(test_random(&seed) % 8);
		size_t next = 1 + test_random(&seed) % (4 * LARGE);
		if (!mine[i]) {
			mine[i] = test_random(&seed) % 2 ? get(next) : a()->calloc(a()->ctx, next, 1);
		} else {
			CHECK(mine[i][0] == number + 1 && mine[i][size[i] - 1] == number + 1, "somebody wrote into it");
			if (test_random(&seed) % 2) {
				mine[i] = a()->realloc(a()->ctx, mine[i], next);
				CHECK(mine[i] && mine[i][0] == number + 1);
			} else {
				give(mine[i], size[i]);
				mine[i] = NULL;
				atomic_fetch_add(&c->work, 1);
				continue;
			}
		}
		size[i] = next;
		mine[i][0] = mine[i][next - 1] = (uint8_t)(number + 1);
	}
	for (int i = 0; i < 8; i++)
		if (mine[i])
			give(mine[i], size[i]);
}

static void child(void *arg)
{
	// It is not recorded, and what it inherited can be freed.
	give(arg, MIB);
	CHECK(!is_mapped(arg, MIB));
	if (TEST_ASAN || TEST_TSAN)
		return; // a thread that is not here may hold a lock of their malloc
	unsigned long live = stats().live;
	void *ptr = get(MIB);
	CHECK(stats().live == live);
	give(ptr, MIB);
}

// Threads make and free; another drains, releases, and forks. Each array is told of once, and dies once.
static void threads(void)
{
	static uint64_t alive[1 << 14];
	struct test_crowd c = {0};
	size_t n_alive = 0, deaths = 0;
	start(MIB);
	uint8_t *inherited = get(MIB);
	told(UF_ARRAY_BORN, inherited, MIB);
	test_crowd_start(&c, 4, worker, NULL);
	for (int round = 0; deaths < (size_t)test_rounds(4000); round++) {
		size_t n = uf_arrays_drain(round % 2 ? 0 : 100000, events, 64);
		for (size_t i = 0; i < n; i++) {
			size_t at = 0;
			while (at < n_alive && alive[at] != events[i].address)
				at++;
			if (events[i].kind == UF_ARRAY_BORN) {
				CHECK(at == n_alive && n_alive < sizeof(alive) / sizeof(*alive), "born where one lives");
				alive[n_alive++] = events[i].address;
			} else {
				CHECK(at < n_alive, "died, but was never born");
				alive[at] = alive[--n_alive];
				CHECK(is_mapped((void *)events[i].address, 4096));
				CHECK(uf_arrays_release(events[i].address));
				deaths++;
			}
		}
		if (round % 500 == 0) {
			int status = test_in_child(child, inherited);
			CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%x", status);
		}
	}
	test_crowd_stop(&c, "making arrays");
	give(inherited, MIB);
	uf_arrays_stop();
	CHECK(stats().live == 0 && stats().dead == 0 && stats().spare_bytes == 0 && stats().failed == 0);
}

int main(int argc, char **argv)
{
	test_start(argc, argv);
	const char *only = argc > 1 ? argv[1] : NULL;
	const struct uf_array_options tiny = {.threshold = 4095};
	CHECK(uf_arrays_start(&tiny) == -EINVAL);
	if (RUN("places"))
		places();
	if (RUN("dead"))
		dead();
	if (RUN("brief"))
		brief();
	if (RUN("resized"))
		resized();
	if (RUN("stopped"))
		stopped();
	if (RUN("threads"))
		threads();
	return 0;
}
