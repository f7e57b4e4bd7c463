// SPDX-License-Identifier: Apache-2.0
// Random sequences of events into the fault loop, from a seed that is printed when one fails: touches, scans, evictions,
// prefetches, foreign madvise and mprotect, writes and flushes, changed limits, memories closed and created, forks, dead
// workers. What every byte must be is known at any moment. Every event is made by one thread; some readers run beside it.
// UF_FUZZ_SEED repeats one sequence, UF_FUZZ_ROUNDS says how many there are.
#include <errno.h>
#include <poll.h>
#include <sys/mman.h>

#include "storing.h"
#include "support.h"

enum { LENGTH = 6 << 20, MEMORIES = 4, EVENTS = 250, ROUNDS = 12, UNIT = 4096 };

enum kind { MEMORY, DISK, TMPFS, WORKER, DYING, SCRATCH_ZERO, SCRATCH_FILE, WRITABLE_FILE, STORE, STAGED, KINDS };

struct subject {
	struct uf_memory *m;
	uint8_t *at;
	uint64_t nbytes, block;
	enum kind kind;
	uint8_t salt[LENGTH / UNIT]; // of what was written to each page; 0: the source's byte
	int file;                    // from WRITABLE_FILE on: its own
	uint32_t source;             // STORE, STAGED: likewise
	struct test_crowd crowd;     // readers
	bool read;
};

static struct uf_pager *pager;
static int disk, tmpfs;
static uint32_t source, dying;
static struct subject subjects[MEMORIES];
static uint64_t seed, state;
static unsigned event_number;
static const char *event = "nothing";

#define FUZZ_CHECK(condition) \
	CHECK(condition, "seed %llu, event %u: %s", (unsigned long long)seed, event_number, event)

static uint64_t any(uint64_t n)
{
	return test_random(&state) % n;
}

static bool writable(const struct subject *s)
{
	return s->kind >= SCRATCH_ZERO;
}

static uint8_t right(const struct subject *s, uint64_t k)
{
	uint8_t salt = s->salt[k / UNIT];
	if (salt)
		return (uint8_t)(test_byte(k) ^ salt);
	return s->kind == SCRATCH_ZERO ? 0 : test_byte(k);
}

static bool told(const struct subject *s, uint64_t k)
{
	static const char *const kinds[] = {"memory", "disk", "tmpfs", "worker", "dying worker", "scratch over zeros", "scratch over a file",
					    "writable file", "store", "transactional store"};
	fprintf(stderr, "%s, blocks of %llu: byte %llu of block %llu (state %d) is %d, not %d\n", kinds[s->kind],
		(unsigned long long)s->block, (unsigned long long)k, (unsigned long long)(k / s->block), test_state(s->m, k / s->block),
		s->at[k], right(s, k));
	return false;
}

// True where every byte of the range is as it must be.
static bool is_right(const struct subject *s, uint64_t k, uint64_t n)
{
	for (uint64_t i = k; i < k + n; i++)
		if (((const volatile uint8_t *)s->at)[i] != right(s, i))
			return told(s, i);
	return true;
}

// A byte in each page, and all bytes of some: quick, and no page is left out.
static bool all_right(const struct subject *s)
{
	for (uint64_t k = 0; k < s->nbytes; k += UNIT) {
		uint64_t i = k + any(UNIT);
		if (i < s->nbytes && !is_right(s, i, 1))
			return false;
	}
	uint64_t k = any(s->nbytes);
	return is_right(s, k, s->nbytes - k < 70000 ? s->nbytes - k : 70000);
}

static void reader(struct test_crowd *c, int number)
{
	struct subject *s = c->arg;
	uint64_t r = seed * 2 + 1 + (uint64_t)number;
	while (!atomic_load(&c->stop)) {
		uint64_t k = test_random(&r) % s->nbytes;
		// A signal: the event just took access away. Nothing else may be seen but what is right.
		uint8_t value;
		if (!test_touch(s->at + k, &value))
			CHECK(value == test_byte(k), "seed %llu: byte %llu", (unsigned long long)seed, (unsigned long long)k);
		atomic_fetch_add(&c->work, 1);
	}
}

static void create(struct subject *s)
{
	static const uint64_t blocks[] = {4096, 16384, 65536, 65536, 262144, 2 << 20};
	memset(s->salt, 0, sizeof(s->salt));
	s->kind = (enum kind)any(KINDS);
	s->nbytes = LENGTH - any(3) * 12345;
	s->block = blocks[any(6)];
	s->file = s->kind >= WRITABLE_FILE ? test_file(LENGTH, any(2)) : -1;
	s->source = s->kind >= STORE ? storing_add(pager, s->kind == STAGED, s->file) : s->kind == DYING ? dying : source;
	struct uf_memory_options o = {
		.name = "fuzz",
		.nbytes = s->nbytes,
		.block = s->block,
		.budget = any(2) ? s->block * (8 + any(16)) : 0,
		.address = test_reference(LENGTH),
		.fd = s->kind == WRITABLE_FILE ? s->file : s->kind == DISK || s->kind == SCRATCH_FILE ? disk : tmpfs,
		.source_id = s->source,
		.no_readahead = any(3) == 0,
		.delivery = any(3) ? UF_DELIVERY_THREAD : UF_DELIVERY_DIRECT,
	};
	switch (s->kind) {
	case MEMORY:
		o.source = UF_SOURCE_MEMORY;
		break;
	case WORKER:
	case DYING:
	case STORE:
	case STAGED:
		o.source = UF_SOURCE_WORKER;
		break;
	case SCRATCH_ZERO:
		o.source = UF_SOURCE_ZERO;
		break;
	default:
		o.source = UF_SOURCE_FILE;
	}
	o.store = s->kind == STAGED ? UF_STORE_STAGED : s->file >= 0 ? UF_STORE_SOURCE : writable(s) ? UF_STORE_SCRATCH : UF_STORE_NONE;
	if (writable(s) && any(2)) {
		uint64_t unit = s->block << any(3);
		o.write_unit = unit > UF_EXTENT ? UF_EXTENT : unit;
	}
	test_memory_source(pager, &o, &s->m);
	s->at = uf_memory_address(s->m);
	// Only of what nobody writes: a reader could not say what is right.
	s->read = !writable(s) && any(2);
	if (s->read)
		test_crowd_start(&s->crowd, 2, reader, s);
}

static void end(struct subject *s)
{
	if (s->read)
		test_crowd_stop(&s->crowd, "readers");
	if (s->file >= 0) {
		// What the file holds after a flush is what was written.
		struct uf_failure why[1];
		uint32_t n;
		FUZZ_CHECK(uf_memory_flush(s->m, 0, (s->nbytes + s->block - 1) / s->block, why, 1, &n) == 0);
		static uint8_t content[LENGTH];
		FUZZ_CHECK(pread(s->file, content, s->nbytes, 0) == (ssize_t)s->nbytes);
		for (uint64_t i = 0; i < s->nbytes; i++)
			FUZZ_CHECK(content[i] == right(s, i));
	}
	uf_memory_destroy(s->m);
	if (s->file >= 0)
		close(s->file);
	if (s->kind >= STORE)
		CHECK(uf_source_drop(pager, s->source) == 0);
}

static void write_some(struct subject *s)
{
	uint64_t page = any(s->nbytes / UNIT), n = any(6) ? any(8) + 1 : any(300) + 1;
	uint8_t salt = (uint8_t)(1 + any(255));
	for (; n && (page + 1) * UNIT <= s->nbytes; n--, page++) {
		s->salt[page] = salt;
		for (uint64_t i = page * UNIT; i < (page + 1) * UNIT; i++)
			s->at[i] = (uint8_t)(test_byte(i) ^ salt);
	}
}

static void in_child(void *arg)
{
	(void)arg;
	for (int i = 0; i < MEMORIES; i++) {
		FUZZ_CHECK(all_right(&subjects[i]));
		uf_memory_evict(subjects[i].m, 0, 64);
		if (writable(&subjects[i])) {
			write_some(&subjects[i]); // stays in the child
			FUZZ_CHECK(uf_memory_forked(subjects[i].m));
		}
		FUZZ_CHECK(all_right(&subjects[i]));
	}
}

static void foreign(struct subject *s)
{
	uint64_t pages = s->nbytes / UNIT, page = any(pages), n = any(4) ? any(40) + 1 : pages;
	n = n > pages - page ? pages - page : n;
	void *at = s->at + page * UNIT;
	static const int harmless[] = {MADV_FREE, MADV_COLD, MADV_PAGEOUT, MADV_SEQUENTIAL, MADV_NOHUGEPAGE, MADV_DODUMP, MADV_NORMAL};
	// What is dirty is gone after MADV_DONTNEED, as it would be from any memory; MADV_FREE may drop it any time.
	if (!writable(s) && any(2))
		madvise(at, n * UNIT, MADV_DONTNEED);
	else if (!writable(s) && any(4) == 0) {
		mlock(at, n * UNIT);
		munlock(at, n * UNIT);
	} else
		madvise(at, n * UNIT, harmless[writable(s) ? 1 + any(6) : any(7)]);
	if (!writable(s) && any(4) == 0) {
		FUZZ_CHECK(mprotect(at, n * UNIT, PROT_NONE) == 0 && mprotect(at, n * UNIT, PROT_READ) == 0);
	}
}

static void one_event(void)
{
	struct subject *s = &subjects[any(MEMORIES)];
	uint64_t blocks = (s->nbytes + s->block - 1) / s->block, first = any(blocks), count = any((1 << 20) / s->block + 2) + 1;
	struct uf_failure why[2];
	uint32_t n;
	unsigned what = (unsigned)any(100);
	if (what < 25) {
		event = "touches";
		for (int i = 0; i < 30; i++)
			FUZZ_CHECK(is_right(s, any(s->nbytes), 1));
	} else if (what < 33) {
		event = "scan";
		uint64_t k = any(s->nbytes), step = any(2) ? UNIT : 5 * UNIT;
		for (int i = 0; i < 100 && k < s->nbytes; i++, k += step)
			FUZZ_CHECK(is_right(s, k, 1));
	} else if (what < 45) {
		event = "evict";
		uf_memory_evict(s->m, first, count);
	} else if (what < 53) {
		event = "prefetch";
		FUZZ_CHECK(uf_memory_prefetch(s->m, first, count, any(2), why) == 0);
	} else if (what < 63) {
		event = "foreign call";
		foreign(s);
	} else if (what < 80) {
		event = "write";
		if (writable(s))
			write_some(s);
	} else if (what < 85) {
		event = "flush";
		if (writable(s))
			FUZZ_CHECK(uf_memory_flush(s->m, first, count, why, 2, &n) == 0);
	} else if (what < 88) {
		event = "pin";
		if (writable(s) && (first + 1) * s->block <= s->nbytes) {
			FUZZ_CHECK(uf_memory_pin(s->m, first, 1, why) == 0);
			uf_memory_evict(s->m, 0, blocks);
			FUZZ_CHECK(test_state(s->m, first) != UF_ABSENT);
			FUZZ_CHECK(uf_memory_unpin(s->m, first, 1) == 0);
		}
	} else if (what < 90) {
		event = "limit";
		uf_pager_set_limit(pager, (4 + any(20)) << 20);
	} else if (what < 92) {
		event = "advice";
		uf_memory_advise(s->m, (enum uf_advice)any(3));
	} else if (what < 94) {
		event = "worker killed";
		pid_t pids[8];
		int found = test_children(pids, 8);
		// One that has not answered yet and dies three times in a row counts as one that does not start.
		if (found && any(4) == 0)
			kill(pids[any((uint64_t)found)], SIGKILL);
	} else if (what < 96) {
		event = "close and create";
		end(s);
		create(s);
	} else if (what < 97) {
		event = "fork";
		int status = test_in_child(in_child, NULL);
		FUZZ_CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	} else {
		event = "look";
		FUZZ_CHECK(all_right(s));
		struct uf_stats st = test_stats(s->m);
		FUZZ_CHECK(st.errors == 0 && st.poisoned == 0 && st.write_errors == 0);
	}
}

static void sequence(uint64_t from)
{
	seed = from;
	state = from * 0x9e3779b97f4a7c15ULL | 1;
	struct uf_pager_options o = test_options((8 + any(16)) << 20);
	o.no_extents = any(3) == 0;
	o.no_move = any(3) == 0;
	CHECK(uf_pager_create(&o, &pager) == 0);
	source = test_worker_source(pager, "ok");
	dying = test_worker_source(pager, "die:40");
	for (int i = 0; i < MEMORIES; i++)
		create(&subjects[i]);
	for (event_number = 0; event_number < EVENTS; event_number++)
		one_event();
	event = "the end";
	for (int i = 0; i < MEMORIES; i++) {
		FUZZ_CHECK(all_right(&subjects[i]));
		end(&subjects[i]);
	}
	CHECK(uf_source_drop(pager, source) == 0 && uf_source_drop(pager, dying) == 0);
	test_settle(pager);
	test_end(pager);
}

int main(int argc, char **argv)
{
	storing_start(argc, argv);
	test_start(argc, argv);
	test_needs_userfaultfd();
	test_reference(LENGTH);
	test_guard();
	disk = test_file(LENGTH, true);
	tmpfs = test_file(LENGTH, false);
	const char *one = getenv("UF_FUZZ_SEED"), *many = getenv("UF_FUZZ_ROUNDS");
	int rounds = many ? atoi(many) : getenv("UF_TEST_SLOW") ? 1 : TEST_TSAN || TEST_ASAN ? ROUNDS / 3 : ROUNDS;
	if (one)
		sequence(strtoull(one, NULL, 10));
	else
		for (int i = 1; i <= rounds; i++)
			sequence((uint64_t)i);
	CHECK(test_threads_left(test_base_threads()));
	return 0;
}
