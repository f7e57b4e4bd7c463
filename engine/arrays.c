// SPDX-License-Identifier: Apache-2.0
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "array_maps.h"
#include "internal.h"

enum {
	SMALLEST_PAGE = 4096,
	BUCKETS = 4096,
	SLAB = 1 << 16,
};

enum state {
	BRIEF,    // no drain has told of it: its addresses are ours to use again
	TOLD,     // somebody may be tracking it
	DEAD,     // it died, no drain has told of that
	RELEASED, // a drain has; waits for release
};

struct block {
	struct block *chain;       // same bucket, or the next unused
	struct block *prev, *next; // of the list that it is on: young while BRIEF, dead while DEAD
	uintptr_t address;
	size_t nbytes, mapped;
	uint64_t born_ns, died_ns;
	enum state state;
	bool dropped;
};

struct list {
	struct block *first, *last;
};

static void *on_malloc(void *ctx, size_t size);
static void *on_calloc(void *ctx, size_t count, size_t size);
static void *on_realloc(void *ctx, void *ptr, size_t size);
static void on_free(void *ctx, void *ptr, size_t size);

static struct uf_array_handler handler = {
	.name = "userfault",
	.version = 1,
	.allocator = {NULL, on_malloc, on_calloc, on_realloc, on_free},
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct uf_array_options options;
static struct uf_array_allocator below; // set once, before the first large array
static struct uf_array_stats stats;
static struct block *buckets[BUCKETS], *unused;
static struct list young, dead;
static bool running;
// Written under the lock, read by the handler without it. Relaxed: what follows from it is decided again under the lock, and one
// who sees an old value only leaves an array to the allocator below.
static uint64_t threshold = UINT64_MAX;

// --- blocks, under the lock

static struct block **bucket_of(uintptr_t address)
{
	return &buckets[(address / SMALLEST_PAGE * 0x9e3779b97f4a7c15ULL) >> 52 & (BUCKETS - 1)];
}

static struct block **find(uintptr_t address)
{
	struct block **at = bucket_of(address);
	while (*at && (*at)->address != address)
		at = &(*at)->chain;
	return at;
}

// Not from malloc: we may be inside of it.
static struct block *block_new(void)
{
	if (!unused) {
		struct block *slab = mmap(NULL, SLAB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (slab == MAP_FAILED)
			return NULL;
		for (size_t i = 0; i < SLAB / sizeof(*slab); i++) {
			slab[i].chain = unused;
			unused = &slab[i];
		}
	}
	struct block *b = unused;
	unused = b->chain;
	return b;
}

static void push(struct list *l, struct block *b)
{
	b->prev = l->last;
	b->next = NULL;
	*(l->last ? &l->last->next : &l->first) = b;
	l->last = b;
}

static void take(struct list *l, struct block *b)
{
	*(b->prev ? &b->prev->next : &l->first) = b->next;
	*(b->next ? &b->next->prev : &l->last) = b->prev;
}

// The block is known no more; what it mapped is the caller's.
static struct uf_array_map block_end(struct block **at)
{
	struct block *b = *at;
	struct uf_array_map mapping = {b->address, b->mapped};
	*at = b->chain;
	b->chain = unused;
	unused = b;
	return mapping;
}

static void count_live(const struct block *b, bool more)
{
	stats.live += more ? 1 : -1;
	stats.live_bytes += more ? b->nbytes : -b->nbytes;
}

static void count_dead(const struct block *b, bool more)
{
	stats.dead += more ? 1 : -1;
	stats.dead_bytes += more ? b->nbytes : -b->nbytes;
}

// --- the allocator

// Large arrays begin at a page; what malloc gives hardly ever does, so most frees end here without the lock.
static bool may_be_ours(const void *ptr)
{
	return ((uintptr_t)ptr & (SMALLEST_PAGE - 1)) == 0 && ptr != NULL;
}

static bool is_large(size_t size)
{
	return size >= __atomic_load_n(&threshold, __ATOMIC_RELAXED);
}

static void *below_malloc(size_t size)
{
	const struct uf_array_allocator *a = &below;
	return a->malloc ? a->malloc(a->ctx, size) : malloc(size);
}

static void *below_calloc(size_t count, size_t size)
{
	const struct uf_array_allocator *a = &below;
	return a->calloc ? a->calloc(a->ctx, count, size) : calloc(count, size);
}

static void *below_realloc(void *ptr, size_t size)
{
	const struct uf_array_allocator *a = &below;
	return a->realloc ? a->realloc(a->ctx, ptr, size) : realloc(ptr, size);
}

static void below_free(void *ptr, size_t size)
{
	const struct uf_array_allocator *a = &below;
	if (a->free)
		a->free(a->ctx, ptr, size);
	else
		free(ptr);
}

// NULL: it cannot be had as a mapping; the allocator below may still have it.
static void *large_new(size_t size, bool zero)
{
	size_t length = uf_array_pages_up(size);
	if (length < size)
		return NULL;
	struct uf_array_map mapping = {0, 0};
	pthread_mutex_lock(&lock);
	enum uf_array_pages pages = options.pages;
	bool found = !zero && uf_array_spare_take(length, &mapping);
	pthread_mutex_unlock(&lock);
	found = found || uf_array_map(length, pages, &mapping);
	pthread_mutex_lock(&lock);
	struct block *b = found && running ? block_new() : NULL;
	if (b) {
		*b = (struct block){.address = mapping.address, .nbytes = size, .mapped = mapping.mapped,
				    .born_ns = uf_now_ns(), .state = BRIEF};
		struct block **at = bucket_of(b->address);
		b->chain = *at;
		*at = b;
		push(&young, b);
		count_live(b, true);
	} else {
		stats.failed += running;
	}
	pthread_mutex_unlock(&lock);
	if (b)
		return (void *)mapping.address;
	uf_array_unmap(mapping);
	return NULL;
}

// Under the lock; gives out what to unmap. `*drop` is a range whose pages can go, though its addresses cannot.
static struct uf_array_map large_died(struct block **at, struct uf_array_map *drop)
{
	struct block *b = *at;
	count_live(b, false);
	if (b->state == BRIEF) {
		take(&young, b);
		stats.brief++;
		stats.brief_bytes += b->nbytes;
		stats.brief_most = uf_max(stats.brief_most, b->nbytes);
		struct uf_array_map mapping = block_end(at);
		return running && uf_array_spare_keep(mapping) ? (struct uf_array_map){0, 0} : mapping;
	}
	if (!running)
		return block_end(at);
	b->died_ns = uf_now_ns();
	b->state = DEAD;
	push(&dead, b);
	count_dead(b, true);
	if (stats.dead_bytes > options.most_dead) {
		b->dropped = true;
		*drop = (struct uf_array_map){b->address, b->mapped};
	}
	return (struct uf_array_map){0, 0};
}

static bool large_free(void *ptr)
{
	struct uf_array_map mapping = {0, 0}, drop = {0, 0};
	if (!may_be_ours(ptr))
		return false;
	pthread_mutex_lock(&lock);
	struct block **at = find((uintptr_t)ptr);
	bool found = *at && ((*at)->state == BRIEF || (*at)->state == TOLD);
	if (found)
		mapping = large_died(at, &drop);
	// Under the lock: right after it a drain and a release may unmap the range, and it may be another array's.
	if (drop.mapped)
		madvise((void *)drop.address, drop.mapped, MADV_DONTNEED);
	pthread_mutex_unlock(&lock);
	uf_array_unmap(mapping);
	return found;
}

// Its size, 0 if it is not ours. One that shrinks and that nobody tracks stays where it is.
static size_t large_size(const void *ptr, size_t wanted)
{
	size_t size = 0;
	struct uf_array_map rest = {0, 0};
	if (!may_be_ours(ptr))
		return 0;
	pthread_mutex_lock(&lock);
	struct block *b = *find((uintptr_t)ptr);
	if (b && b->state == BRIEF && wanted <= b->mapped && is_large(wanted)) {
		count_live(b, false);
		rest = (struct uf_array_map){b->address + uf_array_pages_up(wanted), b->mapped - uf_array_pages_up(wanted)};
		b->mapped -= rest.mapped;
		b->nbytes = wanted;
		count_live(b, true);
	}
	if (b && (b->state == BRIEF || b->state == TOLD))
		size = b->nbytes;
	pthread_mutex_unlock(&lock);
	uf_array_unmap(rest);
	return size;
}

static void *on_malloc(void *ctx, size_t size)
{
	(void)ctx;
	void *ptr = is_large(size) ? large_new(size, false) : NULL;
	return ptr ? ptr : below_malloc(size);
}

static void *on_calloc(void *ctx, size_t count, size_t size)
{
	(void)ctx;
	size_t all;
	if (__builtin_mul_overflow(count, size, &all))
		return NULL;
	void *ptr = is_large(all) ? large_new(all, true) : NULL;
	return ptr ? ptr : below_calloc(count, size);
}

static void *on_realloc(void *ctx, void *ptr, size_t size)
{
	if (!ptr)
		return on_malloc(ctx, size);
	size_t old = large_size(ptr, size);
	if (old == size)
		return ptr;
	if (old) {
		void *moved = on_malloc(ctx, size);
		if (moved) {
			memcpy(moved, ptr, uf_min(old, size));
			large_free(ptr);
		}
		return moved;
	}
	// How long it was, only the allocator below knows.
	void *grown = below_realloc(ptr, size);
	void *own = grown && is_large(size) ? large_new(size, false) : NULL;
	if (!own)
		return grown;
	memcpy(own, grown, size);
	below_free(grown, size);
	return own;
}

static void on_free(void *ctx, void *ptr, size_t size)
{
	(void)ctx;
	if (!large_free(ptr))
		below_free(ptr, size);
}

// --- those who want to know

struct uf_array_handler *uf_arrays_handler(void)
{
	return &handler;
}

static void before_fork(void)
{
	pthread_mutex_lock(&lock);
}

static void after_fork(void)
{
	pthread_mutex_unlock(&lock);
}

static void set_running(bool value)
{
	running = value;
	__atomic_store_n(&threshold, value ? options.threshold : UINT64_MAX, __ATOMIC_RELAXED);
}

// Nobody drains in the child, and what its parent tracks is not tracked here.
static void after_fork_in_child(void)
{
	set_running(false);
	pthread_mutex_unlock(&lock);
}

static void register_fork(void)
{
	pthread_atfork(before_fork, after_fork, after_fork_in_child);
}

int uf_arrays_start(const struct uf_array_options *o)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	int err = 0;
	pthread_once(&once, register_fork);
	pthread_mutex_lock(&lock);
	if (o->threshold < (uint64_t)sysconf(_SC_PAGESIZE)) {
		err = -EINVAL;
	} else if (running) {
		err = -EBUSY;
	} else {
		if (!options.threshold)
			below = o->below;
		options = *o;
		stats.brief = stats.brief_bytes = stats.brief_most = stats.failed = 0;
		set_running(true);
	}
	pthread_mutex_unlock(&lock);
	return err;
}

void uf_arrays_stop(void)
{
	pthread_mutex_lock(&lock);
	set_running(false);
	uf_array_spares_end();
	for (unsigned i = 0; i < BUCKETS; i++) {
		for (struct block **at = &buckets[i]; *at;) {
			struct block *b = *at;
			if (b->state != DEAD && b->state != RELEASED) {
				at = &b->chain;
				continue;
			}
			if (b->state == DEAD)
				take(&dead, b);
			count_dead(b, false);
			uf_array_unmap(block_end(at));
		}
	}
	pthread_mutex_unlock(&lock);
}

size_t uf_arrays_drain(uint64_t min_age_ns, struct uf_array_event *out, size_t most)
{
	size_t n = 0;
	uint64_t now = uf_now_ns();
	pthread_mutex_lock(&lock);
	while (n < most && young.first && young.first->born_ns + min_age_ns <= now) {
		struct block *b = young.first;
		take(&young, b);
		b->state = TOLD;
		out[n++] = (struct uf_array_event){b->address, b->nbytes, b->born_ns, 0, UF_ARRAY_BORN, 0};
	}
	while (n < most && dead.first) {
		struct block *b = dead.first;
		take(&dead, b);
		b->state = RELEASED;
		out[n++] = (struct uf_array_event){b->address, b->nbytes, b->born_ns, b->died_ns, UF_ARRAY_DIED, b->dropped};
	}
	pthread_mutex_unlock(&lock);
	return n;
}

bool uf_arrays_is_young(uint64_t address)
{
	pthread_mutex_lock(&lock);
	const struct block *b = young.last;
	while (b && (address < b->address || address >= b->address + b->nbytes))
		b = b->prev;
	pthread_mutex_unlock(&lock);
	return b != NULL;
}

bool uf_arrays_release(uint64_t address)
{
	struct uf_array_map mapping = {0, 0};
	pthread_mutex_lock(&lock);
	struct block **at = find(address);
	bool found = *at && (*at)->state == RELEASED;
	if (found) {
		count_dead(*at, false);
		mapping = block_end(at);
	}
	pthread_mutex_unlock(&lock);
	uf_array_unmap(mapping);
	return found;
}

void uf_arrays_get_stats(struct uf_array_stats *ret)
{
	pthread_mutex_lock(&lock);
	*ret = stats;
	ret->spare_bytes = uf_array_spare_bytes();
	pthread_mutex_unlock(&lock);
}
