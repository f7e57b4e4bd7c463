// SPDX-License-Identifier: Apache-2.0
// Direct delivery: UFFD_FEATURE_SIGBUS turns a fault into SIGBUS on the thread that made it, and that thread serves itself
// inside the handler (sigbus.c). No message, no switch to another thread and back.
//
// The handler may take the pager's lock: SIGBUS is synchronous, and the engine never touches paged memory while it holds the
// lock, so the interrupted thread does not hold it. The handler's mask is full: another handler that touched the block which its
// own thread is loading would wait for itself. What others own is waited for by futex on the block's state word, but not for
// long: after STAY_NS the handler returns, the signals that came meanwhile are delivered, and the instruction faults again.
//
// System calls on missing pages fail with EFAULT here, since the kernel cannot deliver a signal to itself: the program
// populates first, or uses the fault thread.
#include <sched.h>
#include <stdalign.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include "internal.h"

enum {
	ENTRIES = 32,
	STAY_NS = 20000000,  // how long the signals of a waiting thread are held up
	RETRY_NS = 1000000,  // what is absent for want of a job or of room changes its state only when it is asked for again
	TIMES = 100,         // a thread that comes back for a page whose block is there: so often is no race with others
};

// --- which memories: a table that handlers read without locks

struct entry {
	alignas(64) _Atomic(struct uf_memory *) memory; // NULL: free
	_Atomic uintptr_t base;
	_Atomic size_t length;
	_Atomic uint32_t users; // threads between their look at the entry and their reference to the memory
};

static struct table {
	struct entry entry[ENTRIES];
	_Atomic(struct table *) next; // never freed: handlers walk it
} first_table;

// Inside the pager's lock, which fork holds: never held when a child is made.
static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;
UF_HANDLER_LOCAL struct entry *last_entry;

static struct entry *free_entry(void)
{
	for (struct table *t = &first_table;; t = atomic_load_explicit(&t->next, memory_order_relaxed)) {
		for (unsigned i = 0; i < ENTRIES; i++)
			if (!atomic_load_explicit(&t->entry[i].memory, memory_order_relaxed))
				return &t->entry[i];
		if (!atomic_load_explicit(&t->next, memory_order_relaxed)) {
			struct table *more = aligned_alloc(alignof(struct table), sizeof(*more));
			if (!more)
				return NULL;
			memset(more, 0, sizeof(*more));
			atomic_store_explicit(&t->next, more, memory_order_release);
		}
	}
}

// Lock held.
static int add_entry(struct uf_memory *m)
{
	pthread_mutex_lock(&table_lock);
	struct entry *e = free_entry();
	if (e) {
		atomic_store_explicit(&e->base, (uintptr_t)m->base, memory_order_relaxed);
		atomic_store_explicit(&e->length, m->length, memory_order_relaxed);
		atomic_store_explicit(&e->memory, m, memory_order_release);
	}
	pthread_mutex_unlock(&table_lock);
	return e ? 0 : -ENOMEM;
}

void uf_direct_remove(struct uf_memory *m)
{
	pthread_mutex_lock(&table_lock);
	for (struct table *t = &first_table; t; t = atomic_load_explicit(&t->next, memory_order_relaxed)) {
		for (unsigned i = 0; i < ENTRIES; i++) {
			struct entry *e = &t->entry[i];
			if (atomic_load_explicit(&e->memory, memory_order_relaxed) != m)
				continue;
			atomic_store_explicit(&e->length, 0, memory_order_relaxed);
			// Sequentially consistent, as in take: either it sees NULL, or we see that it looks.
			atomic_store(&e->memory, NULL);
			while (atomic_load(&e->users)) // a few instructions
				sched_yield();
		}
	}
	pthread_mutex_unlock(&table_lock);
}

void uf_direct_forked(void)
{
	for (struct table *t = &first_table; t; t = atomic_load_explicit(&t->next, memory_order_relaxed)) {
		for (unsigned i = 0; i < ENTRIES; i++) {
			struct uf_memory *m = atomic_load_explicit(&t->entry[i].memory, memory_order_relaxed);
			atomic_store_explicit(&t->entry[i].users, 0, memory_order_relaxed);
			if (m)
				atomic_store_explicit(&m->waiters, 0, memory_order_relaxed); // were threads of the parent
		}
	}
}

static struct uf_memory *take(struct entry *e, uintptr_t address)
{
	// Acquire: an entry that is used again has its new base when it has its new memory.
	struct uf_memory *m = atomic_load_explicit(&e->memory, memory_order_acquire);
	if (!m || address - atomic_load_explicit(&e->base, memory_order_relaxed) >=
			  atomic_load_explicit(&e->length, memory_order_relaxed))
		return NULL;
	atomic_fetch_add(&e->users, 1);
	m = atomic_load(&e->memory);
	if (m && address - (uintptr_t)m->base < m->length)
		atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed); // its creator holds one until it has removed it
	else
		m = NULL;
	atomic_fetch_sub_explicit(&e->users, 1, memory_order_release);
	return m;
}

// A reference, NULL if it is no memory of ours that is served this way.
static struct uf_memory *find(uintptr_t address)
{
	struct uf_memory *m = last_entry ? take(last_entry, address) : NULL;
	for (struct table *t = &first_table; t && !m; t = atomic_load_explicit(&t->next, memory_order_acquire)) {
		for (unsigned i = 0; i < ENTRIES && !m; i++) {
			m = take(&t->entry[i], address);
			if (m)
				last_entry = &t->entry[i];
		}
	}
	return m;
}

// --- waiting for others

void uf_direct_wake(struct uf_memory *m, uint64_t first, uint64_t count)
{
	// Sequentially consistent, as the waiter's count: either it sees the new state, or we see that it waits.
	atomic_thread_fence(memory_order_seq_cst);
	if (!atomic_load_explicit(&m->waiters, memory_order_relaxed))
		return;
	for (uint64_t b = first; b < first + count; b++)
		uf_futex_wake(&m->state[b], INT32_MAX);
}

static void wait_for_change(struct uf_memory *m, uint64_t block, uint32_t seen, uint64_t most_ns)
{
	atomic_fetch_add(&m->waiters, 1);
	// With an end: closing wakes nobody here.
	uf_futex_wait(&m->state[block], seen, uf_min(most_ns, UF_STATE(seen) == UF_ABSENT ? RETRY_NS : STAY_NS));
	atomic_fetch_sub(&m->waiters, 1);
}

// --- staging areas for threads in the handler

enum { ALL_USED = UINT32_MAX >> (32 - UF_DIRECT_STAGINGS) };

static int staging_init(struct uf_pager *p)
{
	for (unsigned i = 0; i < UF_DIRECT_STAGINGS; i++) {
		if (p->direct_staging[i].area)
			continue;
		int err = uf_staging_init(&p->direct_staging[i]);
		if (err)
			return err;
		p->direct_staging[i].huge = false; // a fault fills a few blocks
	}
	return 0;
}

int uf_direct_init(struct uf_pager *p)
{
	return staging_init(p);
}

int uf_direct_add(struct uf_memory *m)
{
	int err = staging_init(m->pager);
	if (!err)
		err = uf_direct_arm();
	return err ? err : add_entry(m);
}

void uf_direct_deinit(struct uf_pager *p)
{
	// Threads may still come out of memories that were closed under them. Acquire: pairs with staging_give.
	while (atomic_load_explicit(&p->direct_used, memory_order_acquire))
		uf_wait_changed(p, 1);
	for (unsigned i = 0; i < UF_DIRECT_STAGINGS; i++)
		uf_staging_deinit(&p->direct_staging[i]);
}

// -1: all are used, and were for STAY_NS.
static int staging_take(struct uf_pager *p)
{
	uint64_t end = 0;
	for (;;) {
		uint32_t used = atomic_load_explicit(&p->direct_used, memory_order_relaxed);
		if (used == ALL_USED) {
			uint64_t now = uf_now_ns();
			end = end ? end : now + STAY_NS;
			if (now >= end)
				return -1;
			uf_futex_wait(&p->direct_used, used, end - now);
			continue;
		}
		int at = __builtin_ctz(~used);
		// Acquire: pairs with the release of who used it before.
		if (atomic_compare_exchange_weak_explicit(&p->direct_used, &used, used | 1u << at, memory_order_acquire,
							  memory_order_relaxed))
			return at;
	}
}

static void staging_give(struct uf_pager *p, int at)
{
	// Release: what was done with the area, and with the pager's descriptors, comes before its next use, or its end.
	if (atomic_fetch_and_explicit(&p->direct_used, ~(1u << at), memory_order_release) == ALL_USED)
		uf_futex_wake(&p->direct_used, 1);
}

// --- serving a fault

struct fault {
	uintptr_t address;
	bool write, present; // was it a write, and was the page there?
};

static void look_at_context(struct fault *f, const struct uf_memory *m, const ucontext_t *context)
{
#if defined(__x86_64__)
	(void)m;
	unsigned long long error = (unsigned long long)context->uc_mcontext.gregs[REG_ERR];
	f->write = error >> 1 & 1;
	f->present = error & 1;
#else
	f->present = uf_page_present(m->pager, (const void *)f->address);
	// Taken for a write: at worst a block is called dirty that is not. On read-only memory only a write faults on a present page.
	f->write = m->store || f->present;
	(void)context;
#endif
}

static bool is_there(uint32_t word)
{
	enum uf_state s = UF_STATE(word);
	return s == UF_CLEAN || s == UF_DIRTY || s == UF_RESTORED || s == UF_REINSTALLED;
}

static bool is_owned(uint32_t word)
{
	enum uf_state s = UF_STATE(word);
	return s == UF_LOADING || s == UF_UPGRADING || s == UF_EVICTING;
}

// Does the page still belong to our mapping? Other code may have mapped something over it, whose bus errors are its own.
// A COPY that cannot read its source tells the two apart: the kernel looks at the destination first.
static bool is_ours(const struct uf_memory *m, const char *page)
{
	struct uffdio_copy c = {(uintptr_t)page, 0, m->pager->page, UFFDIO_COPY_MODE_DONTWAKE, 0};
	while (ioctl(m->uffd, UFFDIO_COPY, &c) && errno == EAGAIN)
		sched_yield();
	return errno != ENOENT || atomic_load_explicit(&m->closed, memory_order_acquire);
}

// This thread comes back for a page of a block that is there, again and again: the page cannot be read (memory that the
// machine has lost, poison that is not ours), or is no longer ours.
static bool is_bus_error(const struct uf_memory *m, const char *page)
{
	UF_HANDLER_LOCAL const char *last;
	UF_HANDLER_LOCAL unsigned times;
	times = page == last ? times + 1 : 0;
	last = page;
	if (times < TIMES)
		return false;
	times = 0;
	return uf_page_present(m->pager, page) || !is_ours(m, page);
}

// True: the instruction may be tried again. False: a real bus error.
static bool serve(struct uf_memory *m, struct fault *f)
{
	struct uf_pager *p = m->pager;
	uint64_t t_ns = uf_now_ns(), block = (f->address - (uintptr_t)m->base) >> m->shift;
	char *page = (char *)(f->address & ~(uintptr_t)(p->page - 1));
	for (bool again = false;; again = true) {
		uint32_t before = uf_word(m, block);
		if (UF_STATE(before) == UF_POISONED) // before 6.6 its pages are PROT_NONE: SIGSEGV, as for the threads that come later
			return !uf_host_probe()->poison;
		if (is_there(before) && again)
			return true;
		if (is_there(before) && is_bus_error(m, page))
			return false;
		// Not while it waits: others may have something to do that is not slow.
		int staging = staging_take(p);
		if (staging < 0)
			return true;
		// After it has the area: the end of a pager that has no open memory waits for those.
		bool closed = atomic_load_explicit(&m->closed, memory_order_acquire);
		if (!closed) { // else PROT_NONE by now, or soon
			uf_fault_step(m, block, page, f->write && f->present, f->write && m->store, t_ns, &p->direct_staging[staging]);
			// The readahead that this fault asked for is the fault thread's work. (While it has a staging area the
			// descriptors stay open.)
			if (atomic_load_explicit(&p->attention, memory_order_relaxed))
				uf_fault_thread_kick(p);
		}
		staging_give(p, staging);
		uint32_t now = uf_word(m, block);
		if (closed || is_there(now) || (is_there(before) && !is_owned(now)))
			return true; // loaded, upgraded, a duplicate, or refused
		if (!is_owned(now) && now != before)
			continue;
		uint64_t stayed = uf_now_ns() - t_ns;
		if (stayed >= STAY_NS)
			return true;
		wait_for_change(m, block, now, STAY_NS - stayed);
	}
}

// In a handler, all signals blocked. True: the instruction may be tried again. False: a real bus error, or no memory of ours.
bool uf_direct_serve(const siginfo_t *info, const void *context)
{
	struct fault f = {.address = (uintptr_t)info->si_addr};
	struct uf_memory *m = find(f.address);
	if (!m)
		return false;
	int cancel;
	// A thread that was cancelled in here would keep what it owns.
	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel);
	look_at_context(&f, m, context);
	bool served = serve(m, &f);
	uf_memory_put(m); // may free it: nobody is in malloc in the middle of an access to paged memory
	pthread_setcancelstate(cancel, NULL);
	return served;
}
