// SPDX-License-Identifier: Apache-2.0
// Direct delivery: the faulting threads serve themselves. Right bytes from every source, with writes, evictions, prefetch and
// forks around them; nobody waits for ever, and nothing is left.
#include <fcntl.h>
#include <sys/mman.h>

#include "writing.h"

enum { BLOCK = 4096, LENGTH = 8 << 20, BLOCKS = LENGTH / BLOCK, SMALL = 1 << 20 };
enum kind { MEMORY, ZERO, FILE_, WORKER, KINDS };

static struct uf_pager *pager;
static int file;
static uint32_t source;

static struct uf_memory *create(struct uf_memory_options o)
{
	struct uf_memory *m;
	o.name = "direct";
	o.nbytes = o.nbytes ? o.nbytes : LENGTH;
	o.block = o.block ? o.block : BLOCK;
	o.address = test_reference(LENGTH);
	o.fd = file;
	o.source_id = o.source_id ? o.source_id : source;
	o.delivery = UF_DELIVERY_DIRECT;
	test_memory_source(pager, &o, &m);
	return m;
}

static struct uf_memory *of_kind(enum kind kind, uint64_t budget)
{
	static const enum uf_source_kind sources[] = {UF_SOURCE_MEMORY, UF_SOURCE_ZERO, UF_SOURCE_FILE, UF_SOURCE_WORKER};
	return create((struct uf_memory_options){.source = sources[kind], .budget = budget});
}

static void reader(struct test_crowd *c, int number)
{
	struct uf_memory *m = c->arg;
	const uint8_t *at = uf_memory_address(m);
	for (uint64_t r = (uint64_t)number * 7919 + 1; !atomic_load(&c->stop);) {
		CHECK(test_touch_right(at, test_random(&r) % LENGTH) == 0);
		atomic_fetch_add(&c->work, 1);
	}
}

// Every source, whole and within a small budget, read by several threads, while it is also prefetched and evicted.
static void reads(void)
{
	static struct test_crowd c;
	for (enum kind kind = 0; kind < KINDS; kind++) {
		for (uint64_t budget = 0; budget <= SMALL; budget += SMALL) {
			struct uf_memory *m = of_kind(kind, budget);
			const uint8_t *at = uf_memory_address(m);
			struct uf_failure why;
			if (kind == ZERO) {
				for (uint64_t i = 0; i < LENGTH; i += 1000)
					CHECK(at[i] == 0);
				uf_memory_destroy(m);
				continue;
			}
			CHECK(test_differs(at, 0, LENGTH) == UINT64_MAX);
			uf_memory_evict(m, 0, BLOCKS);
			test_crowd_start(&c, 6, reader, m);
			for (int i = 0; i < test_rounds(40); i++) {
				uf_memory_evict(m, (uint64_t)i * 31 % BLOCKS, 200);
				CHECK(uf_memory_prefetch(m, (uint64_t)i * 57 % BLOCKS, 100, i & 1, &why) == 0, "%s", why.message);
				test_crowd_work(&c, 50, "readers");
			}
			test_crowd_stop(&c, "readers");
			struct uf_stats s = test_stats(m);
			CHECK(s.faults > 0 && s.errors == 0 && s.poisoned == 0);
			CHECK(!budget || s.resident_peak <= SMALL + (UF_OPS << 12), "%llu bytes resident", (unsigned long long)s.resident_peak);
			uf_memory_destroy(m);
		}
	}
}

// A wild write gets the SIGSEGV of a read-only mapping, whether the page is there or not; and does not spin.
static void wild_writes(void)
{
	struct uf_memory *m = of_kind(MEMORY, 0);
	uint8_t *at = uf_memory_address(m);
	struct uf_failure why;
	test_log_begin();
	int absent = test_poke(at + 5 * BLOCK);
	uint8_t byte = 0;
	int there = test_touch(at + 9 * BLOCK, &byte) ? -1 : test_poke(at + 9 * BLOCK);
	int err = uf_memory_prefetch(m, 1024, 512, true, &why), huge = test_poke(at + 1200 * BLOCK);
	free(test_log_end());
	CHECK(absent == SIGSEGV && there == SIGSEGV && err == 0 && huge == SIGSEGV, "%d %d %d %d", absent, there, err, huge);
	CHECK(test_differs(at, 0, LENGTH) == UINT64_MAX);
	uf_memory_destroy(m);
}

// System calls cannot wait: EFAULT where a page is missing or protected, until it was loaded.
static void kernel_access(void)
{
	struct uf_memory *m = create((struct uf_memory_options){.source = UF_SOURCE_MEMORY, .store = UF_STORE_SCRATCH});
	uint8_t *at = uf_memory_address(m);
	struct uf_failure why;
	int fds[2];
	CHECK(pipe(fds) == 0);
	CHECK(write(fds[1], at, 64) == -1 && errno == EFAULT);
	CHECK(uf_memory_prefetch(m, 0, 1, true, &why) == 0);
	CHECK(write(fds[1], at, 64) == 64);
	CHECK(read(fds[0], at, 64) == -1 && errno == EFAULT, "a first write from the kernel");
	*(volatile uint8_t *)at = 7;
	CHECK(test_state(m, 0) == UF_DIRTY && read(fds[0], at, 64) == 64);
	close(fds[0]);
	close(fds[1]);
	uf_memory_destroy(m);
}

// Each thread keeps versions in pages of its own; all add to a counter on each page; evictions and flushes go on meanwhile.
struct stamps {
	struct uf_memory *m;
	uint32_t version[8][BLOCKS];
	_Atomic uint32_t added[BLOCKS];
};

static void stamper(struct test_crowd *c, int number)
{
	struct stamps *s = c->arg;
	uint32_t *words = uf_memory_address(s->m);
	for (uint64_t r = (uint64_t)number * 104729 + 5; !atomic_load(&c->stop);) {
		uint64_t block = test_random(&r) % BLOCKS, base = block * BLOCK / 4;
		uint32_t *mine = &words[base + 16 + (unsigned)number];
		CHECK(*mine == s->version[number][block], "block %llu: %u, not %u", (unsigned long long)block, *mine, s->version[number][block]);
		if (test_random(&r) % 3 == 0) {
			*mine = ++s->version[number][block];
			__atomic_fetch_add(&words[base], 1, __ATOMIC_RELAXED);
			atomic_fetch_add(&s->added[block], 1);
		}
		atomic_fetch_add(&c->work, 1);
	}
}

static void writes(void)
{
	static struct test_crowd c;
	static struct stamps s;
	memset(&s, 0, sizeof(s));
	s.m = create((struct uf_memory_options){.source = UF_SOURCE_ZERO, .store = UF_STORE_SCRATCH, .budget = SMALL});
	const uint32_t *words = uf_memory_address(s.m);
	test_crowd_start(&c, 8, stamper, &s);
	for (int i = 0; i < test_rounds(60); i++) {
		uint32_t n;
		CHECK(uf_memory_flush(s.m, 0, BLOCKS, NULL, 0, &n) == 0);
		uf_memory_evict(s.m, (uint64_t)i * 97 % BLOCKS, 64);
		test_crowd_work(&c, 1000, "writers");
	}
	test_crowd_stop(&c, "writers");
	for (uint64_t b = 0; b < BLOCKS; b++) {
		CHECK(words[b * BLOCK / 4] == atomic_load(&s.added[b]), "block %llu lost a write", (unsigned long long)b);
		for (int t = 0; t < 8; t++)
			CHECK(words[b * BLOCK / 4 + 16 + (unsigned)t] == s.version[t][b]);
	}
	struct uf_stats now = test_stats(s.m);
	CHECK(now.upgrades > 0 && now.evictions > 0 && now.write_errors == 0);
	uf_memory_destroy(s.m);
}

// Threads that wait for a slow source, more than there are staging areas, leave room for those of a quick one.
struct waiters {
	struct uf_memory *m;
	int wanted;
};

static void waiter(struct test_crowd *c, int number)
{
	struct waiters *w = c->arg;
	atomic_fetch_add(&c->work, 1);
	int sig = test_touch_right(uf_memory_address(w->m), (uint64_t)number * BLOCK);
	CHECK(sig == w->wanted, "thread %d: signal %d", number, sig);
}

static void wait_for_waiters(struct test_crowd *c, struct uf_memory *m)
{
	while (atomic_load(&c->work) < (unsigned long)c->n || atomic_load(&m->waiters) < (unsigned)c->n)
		usleep(1000);
}

static void waiting_holds_up_nobody(void)
{
	static struct test_crowd slow, quick;
	pager = test_pager(1 << 30); // its workers hang with the source: it is no one else's
	uint32_t hang = test_worker_source(pager, "hang");
	struct waiters w = {create((struct uf_memory_options){.source = UF_SOURCE_WORKER, .source_id = hang, .no_readahead = true}), SIGSEGV};
	test_crowd_start(&slow, 2 * UF_DIRECT_STAGINGS, waiter, &w);
	wait_for_waiters(&slow, w.m);
	struct uf_memory *m = of_kind(FILE_, SMALL);
	test_crowd_start(&quick, 2, reader, m);
	test_crowd_work(&quick, 5000, "readers of another memory");
	CHECK(atomic_load(&slow.ended) == 0);
	test_crowd_stop(&quick, "readers of another memory");
	uf_memory_destroy(m);
	// Closing ends the wait of those who are in the handler.
	uf_memory_close(w.m);
	test_crowd_join(&slow, "threads that waited in a memory that was closed");
	uf_memory_destroy(w.m);
	CHECK(uf_source_drop(pager, hang) == 0);
	pager_end(pager);
}

// Memories come and go while others are read: the table of memories is read without locks, and grows.
static void many(void)
{
	enum { MANY = 100 };
	static struct test_crowd c;
	static struct uf_memory *all[MANY];
	struct uf_memory *m = of_kind(MEMORY, SMALL);
	test_crowd_start(&c, 3, reader, m);
	for (int round = 0; round < test_rounds(8); round++) {
		for (int i = 0; i < MANY; i++) {
			all[i] = create((struct uf_memory_options){.source = UF_SOURCE_MEMORY, .nbytes = 4 * BLOCK});
			CHECK(test_differs(uf_memory_address(all[i]), 0, 4 * BLOCK) == UINT64_MAX);
		}
		for (int i = 0; i < MANY; i++)
			uf_memory_destroy(all[i * 37 % MANY]);
	}
	test_crowd_stop(&c, "readers among memories that come and go");
	uf_memory_destroy(m);
}

// Close, again and again, with threads in the middle of faults.
static void doomed(struct test_crowd *c, int number)
{
	const uint8_t *at = uf_memory_address(c->arg);
	for (uint64_t r = (uint64_t)number + 11;;) {
		int sig = test_touch_right(at, test_random(&r) % LENGTH);
		atomic_fetch_add(&c->work, 1);
		if (sig == SIGSEGV)
			return;
		CHECK(sig == 0, "signal %d", sig);
	}
}

static void closes(void)
{
	static struct test_crowd c;
	for (int i = 0; i < test_rounds(40); i++) {
		struct uf_memory *m = of_kind(i % 3 ? i % 3 == 1 ? FILE_ : WORKER : MEMORY, i & 1 ? SMALL : 0);
		test_crowd_start(&c, 4, doomed, m);
		test_crowd_work(&c, 100, "readers");
		uf_memory_close(m);
		test_crowd_join(&c, "readers of a memory that was closed");
		uf_memory_destroy(m);
	}
}

// A forked child serves what it inherited by itself, while the parent's threads are in the middle of faults.
static void child_reads(void *arg)
{
	struct uf_memory **m = arg;
	uint8_t *shared = uf_memory_address(m[1]);
	CHECK(test_differs(uf_memory_address(m[0]), 0, LENGTH) == UINT64_MAX);
	for (uint64_t b = 0; b < BLOCKS; b++) {
		CHECK(shared[b * BLOCK] == 1 + b % 3);
		shared[b * BLOCK + 1]++;
	}
	for (uint64_t b = 0; b < BLOCKS; b++)
		CHECK(shared[b * BLOCK] == 1 + b % 3 && shared[b * BLOCK + 1] == 1);
	uf_memory_destroy(m[0]);
	uf_memory_destroy(m[1]);
}

static void forks(void)
{
	static struct test_crowd c;
	struct uf_memory *m[2] = {of_kind(FILE_, SMALL),
				  create((struct uf_memory_options){.source = UF_SOURCE_ZERO, .store = UF_STORE_SCRATCH, .budget = SMALL})};
	uint8_t *own = uf_memory_address(m[1]);
	for (uint64_t b = 0; b < BLOCKS; b++)
		own[b * BLOCK] = (uint8_t)(1 + b % 3);
	test_crowd_start(&c, 3, reader, m[0]);
	for (int i = 0; i < test_rounds(12); i++) {
		int status = test_in_child(child_reads, m);
		CHECK(status == 0, "the child ended with %x", status);
		test_crowd_work(&c, 200, "readers among forks");
	}
	test_crowd_stop(&c, "readers among forks");
	for (uint64_t b = 0; b < BLOCKS; b++)
		CHECK(own[b * BLOCK] == 1 + b % 3 && own[b * BLOCK + 1] == 0, "a child's change shows");
	uf_memory_destroy(m[0]);
	uf_memory_destroy(m[1]);
}

// A pager ends while a thread is in the handler, of a memory that was closed: it waits inside for a page of the source, which
// other code serves late. What the thread fills must not go under it.
static void touch_last(struct test_crowd *c, int number)
{
	(void)number;
	int sig = test_touch_right(uf_memory_address(c->arg), 2 * BLOCK);
	CHECK(sig == SIGSEGV, "signal %d", sig);
}

static void end_pager(struct test_crowd *c, int number)
{
	(void)number;
	CHECK(uf_pager_shutdown(c->arg) == 0);
}

static bool area_is_used(void *arg)
{
	return atomic_load(&((struct uf_pager *)arg)->direct_used);
}

static bool has_ended(void *arg)
{
	return atomic_load(&((struct test_crowd *)arg)->ended);
}

static void ends_under_a_thread(void)
{
	static struct test_crowd inside, end;
	pager = test_pager(1 << 30);
	int fd;
	char *late = mmap(NULL, 3 * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct uffdio_register r = {{(uintptr_t)late, 3 * BLOCK}, UFFDIO_REGISTER_MODE_MISSING, 0};
	CHECK(uf_uffd_open(false, 0, &fd) == 0 && ioctl(fd, UFFDIO_REGISTER, &r) == 0);
	struct uf_memory *m;
	// The last block is cut short: its bytes go through the staging area.
	test_memory_source(pager, &(struct uf_memory_options){.nbytes = 2 * BLOCK + 100, .block = BLOCK, .address = late,
		.source = UF_SOURCE_MEMORY, .delivery = UF_DELIVERY_DIRECT, .no_readahead = true}, &m);
	test_crowd_start(&inside, 1, touch_last, m);
	CHECK(test_wait(area_is_used, pager));
	uf_memory_close(m);
	test_crowd_start(&end, 1, end_pager, pager);
	for (int i = 0; i < 200 && !has_ended(&end); i++)
		usleep(1000);
	struct uffdio_copy c = {(uintptr_t)late + 2 * BLOCK, (uintptr_t)test_reference(LENGTH), BLOCK, 0, 0};
	CHECK(!has_ended(&end) && ioctl(fd, UFFDIO_COPY, &c) == 0);
	test_crowd_join(&inside, "the thread in the handler");
	test_crowd_join(&end, "the end of the pager");
	uf_memory_destroy(m);
	m = of_kind(MEMORY, 0); // and it starts again
	CHECK(test_differs(uf_memory_address(m), 0, LENGTH) == UINT64_MAX);
	uf_memory_destroy(m);
	close(fd);
	munmap(late, 3 * BLOCK);
	pager_end(pager);
}

// The fault thread where it was asked to be: what is there, and what is not.
static void tuned(void)
{
	CHECK(uf_pager_tune(pager, CPU_SETSIZE + 5, 0) == -EINVAL);
	CHECK(uf_pager_tune(pager, 0, 50000) == 0);
	struct uf_memory *m;
	test_memory_source(pager, &(struct uf_memory_options){.nbytes = LENGTH, .address = test_reference(LENGTH), .source = UF_SOURCE_MEMORY}, &m);
	cpu_set_t set;
	CHECK(pthread_getaffinity_np(pager->fault_thread, sizeof(set), &set) == 0 && CPU_COUNT(&set) == 1 && CPU_ISSET(0, &set));
	CHECK(test_differs(uf_memory_address(m), 0, LENGTH) == UINT64_MAX);
	CHECK(uf_pager_tune(pager, -1, 0) == 0);
	cpu_set_t mine;
	CHECK(pthread_getaffinity_np(pthread_self(), sizeof(mine), &mine) == 0);
	CHECK(pthread_getaffinity_np(pager->fault_thread, sizeof(set), &set) == 0 && CPU_EQUAL(&set, &mine));
	uf_memory_evict(m, 0, BLOCKS);
	CHECK(test_differs(uf_memory_address(m), 0, LENGTH) == UINT64_MAX);
	uf_memory_destroy(m);
}

int main(int argc, char **argv)
{
	test_start(argc, argv);
	test_needs_userfaultfd();
	if (!(uf_host_probe()->features & UFFD_FEATURE_SIGBUS)) {
		printf("no UFFD_FEATURE_SIGBUS here\n");
		return 77;
	}
	test_reference(LENGTH);
	test_guard();
	file = test_file(LENGTH, false);
	const char *only = argc == 2 ? argv[1] : NULL;
	if (RUN("waiting_holds_up_nobody"))
		waiting_holds_up_nobody();
	if (RUN("ends_under_a_thread"))
		ends_under_a_thread();
	pager = test_pager(1 << 30);
	source = test_worker_source(pager, "ok");
	static const struct {
		const char *name;
		void (*run)(void);
	} parts[] = {{"reads", reads}, {"wild_writes", wild_writes}, {"kernel_access", kernel_access}, {"writes", writes},
		     {"many", many}, {"closes", closes}, {"forks", forks}, {"tuned", tuned}};
	for (unsigned i = 0; i < sizeof(parts) / sizeof(parts[0]); i++)
		if (RUN(parts[i].name))
			parts[i].run();
	CHECK(uf_source_drop(pager, source) == 0);
	test_settle(pager);
	test_end(pager);
	return 0;
}
