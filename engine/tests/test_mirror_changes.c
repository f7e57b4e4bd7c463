// SPDX-License-Identifier: Apache-2.0
// The address space changes under tracked memory at the worst moments: while another thread forks, with no mapping left to split;
// or has changed before: huge pages that a child shared.
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "mirror.h"
#include "support.h"

enum { PAGE = 4096, SHORT = 40, LONG = 400 }; // below and above what fork moves back by mremap

static uint8_t byte_of(uint64_t page)
{
	return (uint8_t)(1 + page % 200);
}

static uint8_t *tracked(uint64_t pages)
{
	uint8_t *p = mmap(NULL, (pages + 2) * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(p != MAP_FAILED);
	p += PAGE;
	for (uint64_t i = 0; i < pages; i++)
		p[i * PAGE] = byte_of(i);
	int err = uf_mirror_begin(&(struct uf_span){(uintptr_t)p, (uintptr_t)p + pages * PAGE}, 1);
	CHECK(err == 0, "%s", strerror(-err));
	return p;
}

static void end(uint8_t *p, uint64_t pages)
{
	CHECK(uf_mirror_end(&(struct uf_span){(uintptr_t)p, (uintptr_t)p + pages * PAGE}, 1) == 0);
}

// What another thread does between fork's handlers: this one runs after the mirror's, which were registered later.
static void (*meanwhile)(void);
static uint8_t *area, *moved;
static int file = -1;

static void hook(void)
{
	if (meanwhile)
		meanwhile();
}

static void drop(void)
{
	CHECK(madvise(area + 10 * PAGE, 4 * PAGE, MADV_DONTNEED) == 0);
	CHECK(area[11 * PAGE] == 0, "dropped while a fork began: %d", area[11 * PAGE]);
}

static void move(void)
{
	void *to = mremap(area + 10 * PAGE, 8 * PAGE, 8 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, moved);
	CHECK(to == moved && moved[PAGE] == byte_of(11), "moved while a fork began: %d", moved[PAGE]);
}

static void replace(void)
{
	CHECK(mmap(area + 10 * PAGE, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) != MAP_FAILED);
}

static bool child_is_right(void)
{
	if (meanwhile == drop && (area[12 * PAGE] || area[11 * PAGE]))
		return false;
	if (meanwhile == move && (moved[2 * PAGE] != byte_of(12) || moved[PAGE] != byte_of(11)))
		return false;
	if (meanwhile == replace && area[10 * PAGE])
		return false;
	return area[2 * PAGE] == byte_of(2) && area[30 * PAGE] == byte_of(30);
}

// True: the child was right, too. The parent and the file are right in any case.
static bool forked_once(void (*change)(void), uint64_t pages, const char *what)
{
	area = tracked(pages);
	moved = mmap(NULL, 8 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	file = test_file(8 * PAGE, false);
	uint8_t after[PAGE];
	CHECK(ftruncate(file, 0) == 0 && ftruncate(file, 8 * PAGE) == 0);
	meanwhile = change;
	pid_t child = fork();
	if (!child)
		_exit(!child_is_right());
	meanwhile = NULL;
	int status;
	CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) < 2, "%s: the child: %x", what, status);
	CHECK(pread(file, after, PAGE, 0) == PAGE && after[0] == 0, "%s: the file was written to", what);
	if (change == move)
		CHECK(moved[3 * PAGE] == byte_of(13));
	CHECK(area[2 * PAGE] == byte_of(2) && area[30 * PAGE] == byte_of(30));
	end(area, pages);
	if (change == move)
		CHECK(moved[4 * PAGE] == byte_of(14), "after the end");
	CHECK(munmap(area - PAGE, (pages + 2) * PAGE) == 0 && munmap(moved, 8 * PAGE) == 0);
	close(file);
	return !status;
}

// A fork between the reading of an event and its note leaves the child without it (see mirror_fork.c): not often.
static void forked(void (*change)(void), uint64_t pages, const char *what)
{
	for (int tries = 0; !forked_once(change, pages, what); tries++)
		CHECK(tries < 8, "%s, %llu pages: children are wrong", what, (unsigned long long)pages);
}

// Parts of another protection, or that a fork does not copy: the child has all other bytes.
static void protected_parts(int protection, int advice, const char *what)
{
	uint8_t *p = tracked(SHORT);
	if (advice)
		CHECK(madvise(p + 10 * PAGE, 4 * PAGE, advice) == 0);
	else
		CHECK(mprotect(p + 10 * PAGE, 4 * PAGE, protection) == 0);
	pid_t child = fork();
	if (!child) {
		for (uint64_t i = 0; i < SHORT; i++)
			if ((i < 10 || i >= 14 || protection & PROT_READ) && p[i * PAGE] != byte_of(i))
				_exit(1);
		_exit(0);
	}
	int status;
	CHECK(waitpid(child, &status, 0) == child && status == 0, "%s: the child: %x", what, status);
	end(p, SHORT);
	CHECK(munmap(p - PAGE, (SHORT + 2) * PAGE) == 0);
}

static void does_nothing(void *arg)
{
	(void)arg;
}

// What is tracked is a part of a huge page that a child shared: it is this process's alone again when the child has ended.
static void part_of_a_huge_page(bool without_the_first)
{
	enum { HUGE_SIZE = 2 << 20, FIRST = 64, PAGES = 16 };
	uint8_t *p = mmap(NULL, 2 * HUGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(p != MAP_FAILED);
	uint8_t *huge = (uint8_t *)(((uintptr_t)p + HUGE_SIZE - 1) & ~(uintptr_t)(HUGE_SIZE - 1));
	madvise(huge, HUGE_SIZE, MADV_HUGEPAGE);
	for (uint64_t i = 0; i < HUGE_SIZE / PAGE; i++)
		huge[i * PAGE] = byte_of(i);
	CHECK(test_in_child(does_nothing, NULL) == 0);
	if (without_the_first)
		CHECK(madvise(huge, PAGE, MADV_DONTNEED) == 0);
	struct uf_span all = {(uintptr_t)huge + FIRST * PAGE, (uintptr_t)huge + (FIRST + PAGES) * PAGE};
	CHECK(uf_mirror_begin(&all, 1) == 0);
	for (int round = 0; round < 3; round++) {
		int read = FIRST + 3 + round, written = FIRST + 9 + round;
		if (round) {
			CHECK(huge[read * PAGE] == byte_of((uint64_t)read));
			huge[written * PAGE] = byte_of((uint64_t)written);
		}
		struct uf_found *found;
		size_t n;
		CHECK(uf_mirror_collect(&all, 1, true, &found, &n) == 0);
		CHECK(n == (round ? 2u : 0u), "round %d: %zu ranges", round, n);
		for (size_t i = 0; i < n; i++) {
			int page = (int)((found[i].start - (uintptr_t)huge) / PAGE);
			uint64_t want = UF_FOUND_ACCESSED | (page == written ? UF_FOUND_WRITTEN : 0);
			CHECK(found[i].end - found[i].start == PAGE && (page == read || page == written) && found[i].what == want,
			      "page %d: %d", page, (int)found[i].what);
		}
		free(found);
	}
	CHECK(uf_mirror_end(&all, 1) == 0);
	for (uint64_t i = without_the_first; i < HUGE_SIZE / PAGE; i++)
		CHECK(huge[i * PAGE] == byte_of(i));
	CHECK(munmap(p, 2 * HUGE_SIZE) == 0);
}

// The end of the middle of an area needs two mappings more than there may be. It is whole all the same, and nobody hangs.
static void no_mappings_left(void)
{
	const uint64_t pages = 64, filler = 200000;
	uint8_t *p = tracked(pages);
	uint8_t *x = mmap(NULL, filler * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(x != MAP_FAILED);
	for (uint64_t i = 0; i < filler && !mprotect(x + i * PAGE, PAGE, PROT_READ); i += 2)
		;
	for (int i = 0; i < 4; i++)
		mmap(NULL, PAGE, i % 2 ? PROT_READ : PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	alarm(60); // a hang ends the test
	uf_mirror_end(&(struct uf_span){(uintptr_t)p + 20 * PAGE, (uintptr_t)p + 30 * PAGE}, 1);
	for (uint64_t i = 0; i < pages; i++)
		CHECK(p[i * PAGE] == byte_of(i), "page %llu", (unsigned long long)i);
	CHECK(munmap(x, filler * PAGE) == 0);
	end(p, pages);
	for (uint64_t i = 0; i < pages; i++)
		CHECK(p[i * PAGE] == byte_of(i), "page %llu after the end", (unsigned long long)i);
	alarm(0);
}

int main(int argc, char **argv)
{
	test_start(argc, argv);
	test_needs_userfaultfd();
	const char *only = argc > 1 ? argv[1] : NULL;
	if (uf_mirror_available()) {
		printf("no UFFDIO_MOVE here, or no faults of the kernel\n");
		return 77;
	}
	CHECK(pthread_atfork(hook, NULL, NULL) == 0);
	for (uint64_t pages = SHORT; pages <= LONG; pages += LONG - SHORT) {
		if (RUN("drop"))
			forked(drop, pages, "drop");
		if (RUN("move"))
			forked(move, pages, "move");
		if (RUN("replace"))
			forked(replace, pages, "replace");
	}
	if (RUN("read-only"))
		protected_parts(PROT_READ, 0, "read-only");
	if (RUN("no-access"))
		protected_parts(PROT_NONE, 0, "no access");
	if (RUN("not-copied"))
		protected_parts(PROT_NONE, MADV_DONTFORK, "not copied");
	if (RUN("huge"))
		part_of_a_huge_page(false);
	if (RUN("huge-first-gone"))
		part_of_a_huge_page(true);
	if (!TEST_TSAN && !TEST_ASAN && RUN("no-mappings-left")) // they need some themselves
		no_mappings_left();
	return 0;
}
