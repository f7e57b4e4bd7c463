// SPDX-License-Identifier: Apache-2.0
// Writable memory: what is written is there, in memory, after eviction, in the store after a flush, and nowhere else.
#include <poll.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "lz4.h"
#include "writing.h"

enum { BLOCK = 65536, LENGTH = 4 << 20, TAIL = 4 << 20 | 777 };

static struct uf_pager *pager_for(bool no_move, const char *scratch_dir, uint64_t limit)
{
	struct uf_pager_options o = test_options(limit);
	struct uf_pager *p;
	o.no_move = no_move;
	o.scratch_dir = scratch_dir;
	CHECK(uf_pager_create(&o, &p) == 0);
	return p;
}

static int file_of(uint64_t length)
{
	int fd = memfd_create("file", MFD_CLOEXEC);
	CHECK(fd >= 0 && pwrite(fd, test_reference(length), length, 0) == (ssize_t)length);
	return fd;
}

static void write_some(struct array *a, uint64_t seed, int n)
{
	uint64_t r = seed;
	for (int i = 0; i < n; i++) {
		uint64_t at = test_random(&r) % a->length, most = test_random(&r) % 8 ? 300 : 200000;
		array_write(a, at, test_random(&r) % uf_min(most, a->length - at) + 1, (int)(test_random(&r) % 3), r);
	}
}

// --- a file

static void file(bool no_move, uint64_t block, uint64_t unit)
{
	struct uf_pager *p = pager_for(no_move, NULL, 1 << 30);
	int fd = file_of(TAIL);
	struct uf_memory_options o = {.nbytes = TAIL, .block = block, .source = UF_SOURCE_FILE, .fd = fd,
				      .store = UF_STORE_SOURCE, .write_unit = unit};
	struct array a = array_of(p, o, test_reference(TAIL));
	array_write(&a, TAIL - 300, 300, 1, 5);
	comes_to(&a, a.blocks - 1, UF_DIRTY);
	CHECK(test_stats(a.m).dirty == a.block && test_stats(a.m).upgrades == 0, "a first access that writes traps once");
	CHECK(a.at[0] == a.want[0]);
	comes_to(&a, 0, UF_CLEAN);
	array_write(&a, 10, 1, 1, 6);
	comes_to(&a, 0, UF_DIRTY);
	CHECK(test_stats(a.m).upgrades == 1);
	flush_well(&a, "the first");
	file_right(&a, fd, "after the first flush");
	struct stat st;
	CHECK(fstat(fd, &st) == 0 && st.st_size == TAIL, "the last block's padding went to the file");
	struct uf_stats s = test_stats(a.m);
	CHECK(s.dirty == 0 && s.writebacks == 2 && s.bytes_written == a.block + TAIL % a.block && s.write_errors == 0);
	CHECK(test_state(a.m, 0) == UF_CLEAN && test_state(a.m, a.blocks - 1) == UF_CLEAN);
	flush_well(&a, "nothing to do");
	CHECK(test_stats(a.m).writebacks == 2);
	for (uint64_t round = 0; round < 12; round++) {
		write_some(&a, 1000 + round, 60);
		array_right(&a, "in memory");
		if (round % 3 == 0)
			evict_all(&a, "evict");
		else if (round % 3 == 1)
			flush_well(&a, "flush");
		array_right(&a, "afterwards");
		if (round % 3 != 2) {
			file_right(&a, fd, "afterwards");
			CHECK(test_stats(a.m).dirty == 0);
		}
	}
	// A part of it only.
	array_write(&a, 0, 1, 1, 3);
	array_write(&a, LENGTH / 2, 1, 1, 4);
	struct uf_failure why;
	uint32_t n;
	CHECK(uf_memory_flush(a.m, LENGTH / 2 / block, 1, &why, 1, &n) == 0);
	comes_to(&a, 0, UF_DIRTY);
	comes_to(&a, LENGTH / 2 / block, UF_CLEAN);
	CHECK(uf_memory_flush(a.m, a.blocks, 1, &why, 1, &n) == 0 && n == 0);
	array_end(&a);
	close(fd);
	pager_end(p);
}

// --- within a budget

static void budget(bool no_move, enum uf_store_kind store, uint64_t block, uint64_t unit)
{
	const uint64_t length = 8 << 20, budget = 2 << 20;
	struct uf_pager *p = pager_for(no_move, NULL, 1 << 30);
	int fd = file_of(length);
	struct uf_memory_options o = {.nbytes = length, .block = block, .source = UF_SOURCE_FILE, .fd = fd, .budget = budget,
				      .store = store, .write_unit = unit};
	struct array a = array_of(p, o, test_reference(length));
	for (int round = 0; round < 3; round++) {
		for (uint64_t b = 0; b < a.blocks; b++)
			array_write(&a, b * block, uf_min(block, 3000), (int)(b % 3), b + (uint64_t)round * 77);
		write_some(&a, 4242 + (uint64_t)round, 100);
		array_right(&a, "within a small budget");
	}
	struct uf_stats s = test_stats(a.m);
	CHECK(s.writebacks >= 3 * (length - budget) / block / 2, "%llu", (unsigned long long)s.writebacks);
	// Slots hold a quarter of the budget; what came back from a slot is there twice until that is written; and who faults has a block.
	CHECK(s.resident_peak <= budget + budget / 2 + 4 * uf_max(unit, block), "%llu resident", (unsigned long long)s.resident_peak);
	flush_well(&a, "in the end");
	array_right(&a, "in the end");
	if (store == UF_STORE_SOURCE)
		file_right(&a, fd, "in the end");
	array_end(&a);
	close(fd);
	pager_end(p);
}

// --- scratch

static void scratch(bool no_move, enum uf_source_kind kind, uint64_t unit)
{
	const uint64_t length = TAIL;
	struct uf_pager *p = pager_for(no_move, "/dev/shm", 1 << 30);
	int fd = file_of(length);
	uint8_t *original = malloc(length);
	memcpy(original, test_reference(length), length);
	struct uf_memory_options o = {.nbytes = length, .block = BLOCK, .source = kind, .fd = fd, .address = original,
				      .store = UF_STORE_SCRATCH, .write_unit = unit};
	struct array a = array_of(p, o, kind == UF_SOURCE_ZERO ? NULL : test_reference(length));
	for (int i = 0; i < 3; i++) // compressible, not so, zero
		array_write(&a, (uint64_t)i * 4 * BLOCK, 4 * BLOCK, i, (uint64_t)i + 1);
	evict_all(&a, "the first time");
	array_right(&a, "from scratch");
	struct uf_stats s = test_stats(a.m);
	CHECK(s.dirty == 0 && s.writebacks == 12, "%llu", (unsigned long long)s.writebacks);
	CHECK(s.bytes_scratch >= 4 * BLOCK && s.bytes_scratch <= 5 * BLOCK, "%llu bytes of scratch", (unsigned long long)s.bytes_scratch);
	array_write(&a, 4 * BLOCK, 4 * BLOCK, 2, 9); // zero now: gives its place back
	evict_all(&a, "the second time");
	CHECK(test_stats(a.m).bytes_scratch < BLOCK, "%llu", (unsigned long long)test_stats(a.m).bytes_scratch);
	for (uint64_t round = 0; round < 12; round++) {
		write_some(&a, 5000 + round, 60);
		if (round % 2)
			evict_all(&a, "evict");
		else
			flush_well(&a, "flush");
		array_right(&a, "afterwards");
	}
	CHECK(!memcmp(original, test_reference(length), length), "private changes went to the source");
	memcpy(a.want, original, length);
	file_right(&a, fd, "the source");
	array_end(&a);
	free(original);
	close(fd);
	pager_end(p);
}

// --- no space

static void no_space(void)
{
	// The file may not grow beyond half of it: as a full disk, writes to the rest fail.
	struct uf_pager *p = pager_for(false, NULL, 1 << 30);
	int fd = file_of(LENGTH);
	struct uf_memory_options o = {.nbytes = LENGTH, .block = BLOCK, .source = UF_SOURCE_FILE, .fd = fd, .budget = 1 << 20,
				      .store = UF_STORE_SOURCE};
	struct array a = array_of(p, o, test_reference(LENGTH));
	struct rlimit old, half = {LENGTH / 2, RLIM_INFINITY};
	CHECK(getrlimit(RLIMIT_FSIZE, &old) == 0);
	half.rlim_max = old.rlim_max;
	struct uf_failure why[8] = {0};
	uint32_t n = 0;
	signal(SIGXFSZ, SIG_IGN);
	test_log_begin();
	int limited = setrlimit(RLIMIT_FSIZE, &half);
	for (uint64_t b = 0; b < a.blocks; b++)
		array_write(&a, b * BLOCK, BLOCK, 1, b);
	struct uf_stats s = test_stats(a.m);
	int err = uf_memory_flush(a.m, 0, a.blocks, why, 8, &n);
	uint32_t count = n;
	char *log = test_log_end();
	CHECK(limited == 0 && test_count(log, "Nothing is lost") >= 1, "%s", log);
	free(log);
	array_right(&a, "beyond the budget");
	CHECK(s.resident > 1 << 20 && s.write_errors, "%llu resident", (unsigned long long)s.resident);
	CHECK(err == -EIO && count == LENGTH / 2 / BLOCK, "%d, %u blocks", err, count);
	for (int i = 0; i < 8; i++)
		CHECK(why[i].block >= LENGTH / 2 / BLOCK && why[i].err == -EFBIG && why[i].message[0]);
	s = test_stats(a.m);
	CHECK(s.dirty == LENGTH / 2 && s.errlog[s.nerrors - 1].write && !s.errlog[s.nerrors - 1].poisoned && s.poisoned == 0);
	CHECK(setrlimit(RLIMIT_FSIZE, &old) == 0);
	flush_well(&a, "with space again");
	CHECK(test_stats(a.m).dirty == 0);
	file_right(&a, fd, "with space again");
	evict_all(&a, "with space again");
	array_right(&a, "with space again");
	array_end(&a);
	close(fd);
	pager_end(p);

	// Scratch on a small file system.
	char dir[] = "/tmp/uf-test-XXXXXX";
	CHECK(mkdtemp(dir));
	if (mount("none", dir, "tmpfs", 0, "size=1m")) {
		rmdir(dir);
		printf("  no tmpfs can be mounted here: %s\n", strerror(errno));
		return;
	}
	p = pager_for(false, dir, 1 << 30);
	o = (struct uf_memory_options){.nbytes = LENGTH, .block = BLOCK, .source = UF_SOURCE_ZERO, .budget = 1 << 20,
				       .store = UF_STORE_SCRATCH};
	a = array_of(p, o, NULL);
	umount2(dir, MNT_DETACH);
	rmdir(dir);
	test_log_begin();
	for (int round = 0; round < 2; round++)
		for (uint64_t b = 0; b < a.blocks; b++)
			array_write(&a, b * BLOCK, BLOCK, 1, b + (uint64_t)round);
	log = test_log_end();
	CHECK(strstr(log, "No space left"), "%s", log);
	free(log);
	array_right(&a, "scratch is full");
	s = test_stats(a.m);
	CHECK(s.resident > 1 << 20 && s.poisoned == 0 && s.write_errors);
	for (uint64_t b = 0; b < a.blocks; b++) // now it compresses
		array_write(&a, b * BLOCK, BLOCK, 0, b);
	flush_well(&a, "compressible");
	evict_all(&a, "compressible");
	array_right(&a, "compressible");
	array_end(&a);
	pager_end(p);
}

// --- pins

static void pins(bool no_move)
{
	struct uf_pager *p = pager_for(no_move, NULL, 1 << 30);
	int fd = file_of(LENGTH);
	struct uf_memory_options o = {.nbytes = LENGTH, .block = BLOCK, .source = UF_SOURCE_FILE, .fd = fd, .budget = 1 << 20,
				      .store = UF_STORE_SOURCE};
	struct array a = array_of(p, o, test_reference(LENGTH));
	struct uf_failure why;
	uint32_t n;
	CHECK(uf_memory_pin(a.m, 4, 4, &why) == 0 && uf_memory_pin(a.m, 6, 1, &why) == 0);
	CHECK(uf_memory_pin(a.m, a.blocks, 1, &why) == -ERANGE && uf_memory_pin(a.m, 3, a.blocks, &why) == -ERANGE);
	CHECK(uf_memory_unpin(a.m, 5, 1) == -ENOENT);
	array_write(&a, 5 * BLOCK, BLOCK, 1, 1);
	array_write(&a, 6 * BLOCK + 5, 10, 1, 2);
	for (int round = 0; round < 2; round++)
		for (uint64_t b = 8; b < a.blocks; b++)
			array_write(&a, b * BLOCK, 100, 1, b);
	uf_memory_evict(a.m, 0, a.blocks);
	for (uint64_t b = 4; b < 8; b++)
		CHECK(test_state(a.m, b) == UF_DIRTY, "block %llu: %d", (unsigned long long)b, test_state(a.m, b));
	flush_well(&a, "pinned");
	file_right(&a, fd, "pinned");
	CHECK(test_state(a.m, 4) == UF_DIRTY, "a device may write to it any time: it counts as dirty");
	// A device does: past the protection, as /proc/self/mem is not. Here a plain write must do.
	array_write(&a, 5 * BLOCK, 50, 0, 3);
	flush_well(&a, "pinned");
	file_right(&a, fd, "pinned and written again");
	// Other code drops a page of a pinned block: it comes back, from the store.
	CHECK(madvise(a.at + 4 * BLOCK, 4096, MADV_DONTNEED) == 0);
	array_right(&a, "pinned and dropped");
	CHECK(uf_memory_unpin(a.m, 4, 4) == 0 && uf_memory_unpin(a.m, 4, 4) == -ENOENT);
	uf_memory_evict(a.m, 0, a.blocks);
	CHECK(test_state(a.m, 5) == UF_ABSENT && test_state(a.m, 6) != UF_ABSENT, "pins nest");
	CHECK(uf_memory_unpin(a.m, 6, 1) == 0);
	evict_all(&a, "unpinned");
	array_right(&a, "unpinned");
	file_right(&a, fd, "unpinned");
	uf_memory_close(a.m);
	CHECK(uf_memory_pin(a.m, 0, 1, &why) == -EBADF && uf_memory_flush(a.m, 0, 1, &why, 1, &n) == -EBADF);
	array_end(&a);
	close(fd);
	pager_end(p);
}

// --- other code drops pages

static atomic_bool slow;

ssize_t pwrite(int fd, const void *bytes, size_t n, off_t at)
{
	while (atomic_load(&slow))
		usleep(1000);
	return pwrite64(fd, bytes, n, at);
}

static void dropped(bool no_move, enum uf_store_kind store)
{
	struct uf_pager *p = pager_for(no_move, NULL, 1 << 30);
	int fd = file_of(LENGTH);
	struct uf_memory_options o = {.nbytes = LENGTH, .block = BLOCK, .source = UF_SOURCE_FILE, .fd = fd, .store = store};
	struct array a = array_of(p, o, test_reference(LENGTH));
	test_log_begin();
	// Dirty: what the store has comes back in the place of what was dropped, the rest is as it was.
	memset(a.at, 7, BLOCK);
	CHECK(madvise(a.at + 8192, 4096, MADV_DONTNEED) == 0);
	bool right = !memcmp(a.at + 8192, test_reference(LENGTH) + 8192, 4096) && a.at[8191] == 7 && a.at[12288] == 7;
	comes_to(&a, 0, UF_DIRTY);
	// Written there without a look.
	CHECK(madvise(a.at + 4096, 4096, MADV_DONTNEED) == 0);
	a.at[4100] = 8;
	bool rest = !memcmp(a.at + 4096, test_reference(LENGTH) + 4096, 4) && a.at[4100] == 8 &&
		    !memcmp(a.at + 4101, test_reference(LENGTH) + 4101, 4096 - 5);
	// All of it, and then it is flushed or evicted at once: the store must not get zeros.
	memset(a.at + BLOCK, 9, 2 * BLOCK);
	CHECK(madvise(a.at + BLOCK, BLOCK, MADV_DONTNEED) == 0 && madvise(a.at + 2 * BLOCK + 4096, 4096, MADV_DONTNEED) == 0);
	struct uf_failure why;
	uint32_t n;
	int err = uf_memory_flush(a.m, 0, 3, &why, 1, &n);
	uf_memory_evict(a.m, 0, 3);
	// Clean.
	uint8_t sum = a.at[10 * BLOCK];
	CHECK(madvise(a.at + 10 * BLOCK, BLOCK, MADV_DONTNEED) == 0);
	sum = a.at[10 * BLOCK + 5000];
	char *log = test_log_end();
	CHECK(right && rest, "%d %d", right, rest);
	CHECK(err == 0, "%d %s", err, why.message);
	CHECK(sum == test_byte(10 * BLOCK + 5000));
	CHECK(test_count(log, "other code dropped") == 1, "%s", log);
	free(log);
	memset(a.want, 7, BLOCK);
	memcpy(a.want + 4096, test_reference(LENGTH) + 4096, 8192);
	a.want[4100] = 8;
	memset(a.want + 2 * BLOCK, 9, BLOCK);
	memcpy(a.want + 2 * BLOCK + 4096, test_reference(LENGTH) + 2 * BLOCK + 4096, 4096);
	array_right(&a, "dropped");
	array_end(&a);
	close(fd);
	pager_end(p);
}

static void flush_thread(struct test_crowd *c, int number)
{
	struct uf_failure why;
	uint32_t n;
	(void)number;
	CHECK(uf_memory_flush(c->arg, 0, UINT64_MAX, &why, 1, &n) == 0, "%s", why.message);
}

static bool is_restored(void *arg)
{
	return test_state(arg, 20) == UF_RESTORED;
}

// While it is written: what was dropped comes from the slot.
static void dropped_while_written(bool no_move)
{
	struct uf_pager *p = pager_for(no_move, NULL, 1 << 30);
	int fd = file_of(LENGTH);
	struct uf_memory_options o = {.nbytes = LENGTH, .block = BLOCK, .source = UF_SOURCE_FILE, .fd = fd, .store = UF_STORE_SOURCE};
	struct array a = array_of(p, o, test_reference(LENGTH));
	static struct test_crowd c;
	for (int round = 0; round < 3; round++) {
		array_write(&a, 20 * BLOCK, BLOCK, 1, 3 + (uint64_t)round);
		atomic_store(&slow, true);
		test_crowd_start(&c, 1, flush_thread, a.m);
		bool there = test_wait(is_restored, a.m);
		if (round == 1)
			array_write(&a, 20 * BLOCK + 5000, 10, 0, 8); // the older version is on its way
		CHECK(madvise(a.at + 20 * BLOCK + 8192, 4096, MADV_DONTNEED) == 0);
		if (round == 2)
			array_write(&a, 20 * BLOCK + 8200, 10, 0, 8); // a write into what was dropped
		array_right(&a, "dropped while it is written");
		comes_to(&a, 20, round ? UF_REINSTALLED : UF_RESTORED);
		atomic_store(&slow, false);
		test_crowd_join(&c, "flush");
		CHECK(there);
		array_right(&a, "written");
		comes_to(&a, 20, round ? UF_DIRTY : UF_CLEAN);
		flush_well(&a, "afterwards");
		file_right(&a, fd, "afterwards");
	}
	array_end(&a);
	close(fd);
	pager_end(p);
}

// --- closing

static void scribbler(struct test_crowd *c, int number)
{
	uint8_t *at = uf_memory_address(c->arg), byte;
	uint64_t r = 77 + (uint64_t)number;
	while (!atomic_load(&c->stop)) {
		volatile uint8_t *to = at + test_random(&r) % LENGTH;
		if (test_touch(to, &byte) || test_poke(to))
			return; // it is closed
		atomic_fetch_add(&c->work, 1);
	}
}

static void flushes_until_closed(struct test_crowd *c, int number)
{
	struct uf_failure why;
	uint32_t n;
	while (!atomic_load(&c->stop)) {
		int err = number ? 0 : uf_memory_flush(c->arg, 0, UINT64_MAX, &why, 1, &n);
		if (number)
			uf_memory_evict(c->arg, 0, 40);
		CHECK(err == 0 || err == -EBADF, "%d %s", err, why.message);
		if (err == -EBADF || (number && test_state(c->arg, 0) == UF_ABSENT && atomic_load(&((struct uf_memory *)c->arg)->closed)))
			return;
	}
}

static bool so_many_fds(void *arg)
{
	return test_fd_count() <= *(int *)arg;
}

static void closing(bool no_move, enum uf_store_kind store)
{
	static struct test_crowd c, d;
	struct uf_pager *p = pager_for(no_move, NULL, 1 << 30);
	int fd = file_of(LENGTH), fds = 0;
	for (int round = 0; round < test_rounds(24); round++) {
		struct uf_memory_options o = {.nbytes = LENGTH, .block = round % 2 ? BLOCK : 16384, .source = UF_SOURCE_FILE, .fd = fd,
					      .store = store, .budget = round % 3 ? 1 << 20 : 0, .write_unit = round % 4 ? 0 : BLOCK};
		struct uf_memory *m;
		test_memory_source(p, &o, &m);
		test_crowd_start(&c, 3, scribbler, m);
		test_crowd_start(&d, 2, flushes_until_closed, m);
		test_crowd_work(&c, 300, "scribblers");
		if (round % 4 == 1)
			atomic_store(&slow, true);
		if (round % 8 == 5) // evictions wait for the store
			poll(NULL, 0, 10);
		uf_memory_close(m);
		atomic_store(&slow, false);
		test_crowd_join(&c, "writers of a closed memory");
		atomic_store(&d.stop, true);
		test_crowd_join(&d, "flush and evict of a closed memory");
		uf_memory_destroy(m);
		test_settle(p);
		struct uf_pager_stats s = test_pager_stats(p);
		CHECK(s.resident == 0 && s.memories == 0);
		CHECK(p->leaving == 0 && p->shared.leaving == 0 && p->shared.resident == 0);
		if (!round)
			fds = test_fd_count();
		CHECK(test_wait(so_many_fds, &fds), "%d descriptors, %d before", test_fd_count(), fds); // a write may still end
	}
	close(fd);
	pager_end(p);
}

// --- compression

static void lz4(void)
{
	enum { MOST = 300000 };
	uint8_t *in = malloc(MOST), *packed = malloc(2 * MOST), *out = malloc(MOST + 1);
	uint64_t r = 4711;
	for (int round = 0; round < test_rounds(400); round++) {
		size_t n = round < 40 ? (size_t)round : test_random(&r) % (round % 10 ? 70000 : MOST) + 1;
		for (size_t i = 0; i < n; i++) // from noise to long repeats
			in[i] = i > 20 && test_random(&r) % 256 < (uint64_t)round % 257 ? in[i - 1 - test_random(&r) % 20] : (uint8_t)test_random(&r);
		size_t capacity = round % 3 ? n + n / 200 + 64 : test_random(&r) % (n + 1);
		packed[capacity] = 0x5a;
		size_t k = uf_lz4_compress(in, n, packed, capacity);
		CHECK(k <= capacity && packed[capacity] == 0x5a && (k || !(round % 3)), "%zu bytes into %zu", n, capacity);
		if (!k)
			continue;
		// Exactly as long: a read or write beyond it is AddressSanitizer's to see.
		uint8_t *exact = malloc(k), *room = malloc(n ? n : 1);
		memcpy(exact, packed, k);
		CHECK(uf_lz4_expand(exact, k, room, n) == (ptrdiff_t)n && !memcmp(room, in, n), "round %d, %zu bytes", round, n);
		CHECK(n == 0 || uf_lz4_expand(exact, k, room, n - 1) == -1, "it does not fit");
		for (size_t cut = 0; cut < k; cut += k / 50 + 1)
			CHECK(uf_lz4_expand(exact, cut, room, n) < (ptrdiff_t)n || n == 0);
		for (int damage = 0; damage < 30; damage++) {
			memcpy(exact, packed, k);
			for (int i = 0; i <= damage % 4; i++)
				exact[test_random(&r) % k] = (uint8_t)test_random(&r);
			CHECK(uf_lz4_expand(exact, k, room, n) <= (ptrdiff_t)n);
		}
		free(exact);
		free(room);
	}
	for (int round = 0; round < test_rounds(4000); round++) { // noise
		size_t n = test_random(&r) % 200;
		uint8_t *exact = malloc(n ? n : 1), *room = malloc(64);
		for (size_t i = 0; i < n; i++)
			exact[i] = test_random(&r) % 3 ? (uint8_t)test_random(&r) : 255;
		CHECK(uf_lz4_expand(exact, n, room, 64) <= 64);
		free(exact);
		free(room);
	}
	free(in);
	free(packed);
	free(out);
}

int main(int argc, char **argv)
{
	test_start(argc, argv);
	test_needs_userfaultfd();
	test_reference(8 << 20);
	test_guard();
	const char *only = argc == 2 ? argv[1] : NULL;
	if (RUN("lz4"))
		lz4();
	for (int no_move = 0; no_move < 2; no_move++) {
		if (RUN("file")) {
			file(no_move, BLOCK, 0);
			file(no_move, 4096, BLOCK);
		}
		if (RUN("budget")) {
			budget(no_move, UF_STORE_SOURCE, BLOCK, 0);
			budget(no_move, UF_STORE_SOURCE, 16384, 131072);
			budget(no_move, UF_STORE_SCRATCH, BLOCK, 131072);
		}
		if (RUN("scratch"))
			for (int kind = UF_SOURCE_ZERO; kind <= UF_SOURCE_FILE; kind++)
				scratch(no_move, (enum uf_source_kind)kind, no_move ? 4 * BLOCK : 0);
		if (RUN("pins"))
			pins(no_move);
		if (RUN("dropped")) {
			dropped(no_move, UF_STORE_SOURCE);
			dropped(no_move, UF_STORE_SCRATCH);
			dropped_while_written(no_move);
		}
		if (RUN("closing")) {
			closing(no_move, UF_STORE_SOURCE);
			closing(no_move, UF_STORE_SCRATCH);
		}
	}
	if (RUN("no_space"))
		no_space();
	CHECK(test_threads_left(test_base_threads()));
	return 0;
}
