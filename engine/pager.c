// SPDX-License-Identifier: Apache-2.0
// The pager: its life, its fault thread, references to its memories.
//
// Threads run while somebody holds the pager (an open memory or a source) and for `linger_ns` after that. The supervisor
// (supervisor.c) ends them: it stops the others, joins them, and is itself joined by the next start or shutdown.
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

struct uf_pager *uf_pagers;
#ifdef __GLIBC__
pthread_mutex_t uf_registry_lock = PTHREAD_ADAPTIVE_MUTEX_INITIALIZER_NP;
#else
pthread_mutex_t uf_registry_lock = PTHREAD_MUTEX_INITIALIZER;
#endif

// epoll's user data: a memory's id, or one of these.
enum { EVENT_BELL = UINT32_MAX };

static char **copy_strings(const char *const *list)
{
	size_t n = 0;
	while (list[n])
		n++;
	char **copy = calloc(n + 1, sizeof(*copy));
	for (size_t i = 0; copy && i < n; i++) {
		copy[i] = strdup(list[i]);
		if (!copy[i]) {
			while (i)
				free(copy[--i]);
			free(copy);
			return NULL;
		}
	}
	return copy;
}

static void free_strings(char **list)
{
	for (size_t i = 0; list && list[i]; i++)
		free(list[i]);
	free(list);
}

int uf_pager_create(const struct uf_pager_options *o, struct uf_pager **ret)
{
	if (!o->attempts || o->workers > UF_MAX_WORKERS || (o->workers && !o->worker_argv))
		return -EINVAL;
	struct uf_pager *p = calloc(1, sizeof(*p));
	if (!p)
		return -ENOMEM;
	p->options = *o;
	p->options.linger_ns = uf_min(o->linger_ns, UF_LONGEST_NS);
	p->options.deadline_ns = uf_min(o->deadline_ns, UF_LONGEST_NS);
	p->options.backoff_ns = uf_min(o->backoff_ns, 1ULL << 40);
	p->page = (size_t)sysconf(_SC_PAGESIZE);
	atomic_init(&p->cpu, -1);
	p->limit = o->limit;
	uf_pool_init(&p->shared, 0);
	p->generation_end = -1;
	for (unsigned g = 0; g < UF_GENERATIONS; g++)
		p->generations[g] = -1;
	p->epfd = p->bell = p->super_bell = p->pagemap_fd = p->mem_fd = p->stash_uffd = p->ring_fd = p->blob_fd = -1;
	for (unsigned i = 0; i < UF_MAX_WORKERS; i++)
		p->workers[i].pidfd = -1;
	if (o->worker_argv && !(p->worker_argv = copy_strings(o->worker_argv)))
		goto fail;
	if (o->worker_env && !(p->worker_env = copy_strings(o->worker_env)))
		goto fail;
	p->scratch_dir = strdup(o->scratch_dir ? o->scratch_dir : "/var/tmp");
	if (!p->scratch_dir)
		goto fail;
	uf_mutex_init(&p->lock);
	pthread_condattr_t attr;
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&p->changed, &attr);
	pthread_cond_init(&p->io_work, &attr);
	pthread_condattr_destroy(&attr);
	uf_host_probe();
	uf_fork_handlers();
	pthread_mutex_lock(&uf_registry_lock);
	p->next = uf_pagers;
	uf_pagers = p;
	pthread_mutex_unlock(&uf_registry_lock);
	*ret = p;
	return 0;
fail:
	free_strings(p->worker_argv);
	free_strings(p->worker_env);
	free(p);
	return -ENOMEM;
}

int uf_pager_destroy(struct uf_pager *p)
{
	int err = uf_pager_shutdown(p);
	if (err)
		return err;
	pthread_mutex_lock(&p->lock);
	for (uint32_t i = 0; i < p->memories_capacity; i++)
		if (p->memories[i])
			err = -EBUSY; // closed, but not destroyed, or somebody still comes out of it
	pthread_mutex_unlock(&p->lock);
	if (err)
		return err;
	pthread_mutex_lock(&uf_registry_lock);
	for (struct uf_pager **at = &uf_pagers; *at; at = &(*at)->next) {
		if (*at == p) {
			*at = p->next;
			break;
		}
	}
	pthread_mutex_unlock(&uf_registry_lock);
	pthread_cond_destroy(&p->changed);
	pthread_cond_destroy(&p->io_work);
	pthread_mutex_destroy(&p->lock);
	uf_generations_close(p);
	free_strings(p->worker_argv);
	free_strings(p->worker_env);
	free(p->scratch_dir);
	free(p->memories);
	free(p);
	return 0;
}

int uf_pager_open_fds(struct uf_pager *p)
{
	p->epfd = uf_high_fd(epoll_create1(EPOLL_CLOEXEC));
	p->bell = uf_high_fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
	atomic_store_explicit(&p->kicked, false, memory_order_relaxed); // not the new one
	p->super_bell = uf_high_fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
	// These refer to the address space of who opens them: a forked child opens its own.
	p->pagemap_fd = uf_high_fd(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
	p->mem_fd = uf_high_fd(open("/proc/self/mem", O_RDONLY | O_CLOEXEC));
	struct epoll_event e = {.events = EPOLLIN, .data.u64 = EVENT_BELL};
	if (p->epfd >= 0 && p->bell >= 0 && p->super_bell >= 0 && !epoll_ctl(p->epfd, EPOLL_CTL_ADD, p->bell, &e))
		return 0;
	int err = -errno;
	uf_pager_close_fds(p);
	return err;
}

void uf_pager_close_fds(struct uf_pager *p)
{
	int *fds[] = {&p->epfd, &p->bell, &p->super_bell, &p->pagemap_fd, &p->mem_fd};
	for (unsigned i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
		if (*fds[i] >= 0)
			close(*fds[i]);
		*fds[i] = -1;
	}
}

// Starts what a pager needs to serve faults, if it does not run. The caller then takes a hold (p->holders++) before it
// drops the lock, or the supervisor may end the run again.
int uf_pager_start(struct uf_pager *p)
{
	while (p->phase == UF_STOPPING)
		pthread_cond_wait(&p->changed, &p->lock);
	if (p->phase == UF_RUNNING)
		return 0;
	if (p->super_joinable) {
		pthread_join(p->super_thread, NULL); // it has left the lock for good
		p->super_joinable = false;
	}
	int err = uf_pager_open_fds(p);
	if (err)
		return err;
	err = uf_staging_init(&p->fault_staging);
	if (err)
		goto fail_fds;
	p->stop_fault = p->stop_super = p->stop_io = false;
	err = uf_thread_start(&p->fault_thread, uf_fault_thread, p);
	if (err)
		goto fail_staging;
	err = uf_thread_start(&p->super_thread, uf_super_thread, p);
	if (err)
		goto fail_thread;
	p->super_joinable = true;
	p->phase = UF_RUNNING;
	return 0;

fail_thread:
	p->phase = UF_STOPPING; // others wait
	p->stop_fault = true;
	uf_fault_thread_kick(p);
	pthread_mutex_unlock(&p->lock);
	pthread_join(p->fault_thread, NULL);
	pthread_mutex_lock(&p->lock);
	p->phase = UF_IDLE;
	pthread_cond_broadcast(&p->changed);
fail_staging:
	uf_staging_deinit(&p->fault_staging);
fail_fds:
	uf_pager_close_fds(p);
	return err;
}

int uf_io_start(struct uf_pager *p)
{
	while (p->io_started < UF_IO_THREADS) {
		int err = uf_thread_start(&p->io_threads[p->io_started], uf_io_thread, p);
		if (err)
			return p->io_started ? 0 : err; // fewer will do
		p->io_started++;
	}
	return 0;
}

void uf_pager_release_holder(struct uf_pager *p)
{
	if (--p->holders == 0) {
		p->idle_since_ns = uf_now_ns();
		uf_super_kick(p);
	}
}

int uf_pager_shutdown(struct uf_pager *p)
{
	pthread_mutex_lock(&p->lock);
	if (p->holders) {
		pthread_mutex_unlock(&p->lock);
		return -EBUSY;
	}
	if (p->phase == UF_RUNNING) {
		p->stop_super = true;
		uf_super_kick(p);
	}
	while (p->phase != UF_IDLE) {
		if (p->holders) { // somebody was faster
			p->stop_super = false;
			pthread_mutex_unlock(&p->lock);
			return -EBUSY;
		}
		pthread_cond_wait(&p->changed, &p->lock);
	}
	if (p->super_joinable) {
		pthread_join(p->super_thread, NULL);
		p->super_joinable = false;
	}
	pthread_mutex_unlock(&p->lock);
	return 0;
}

// Lock held; drops it while it waits for a change, at most for so long.
void uf_wait_changed(struct uf_pager *p, long milliseconds)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	t.tv_nsec += milliseconds * 1000000;
	t.tv_sec += t.tv_nsec / 1000000000;
	t.tv_nsec %= 1000000000;
	pthread_cond_timedwait(&p->changed, &p->lock, &t);
}

void uf_fault_thread_kick(struct uf_pager *p)
{
	// Once: while the fault thread does not get to run, each fault of a busy direct memory would ring again.
	if (p->bell >= 0 && !atomic_exchange_explicit(&p->kicked, true, memory_order_acq_rel))
		uf_bell_ring(p->bell);
}

void uf_super_kick(struct uf_pager *p)
{
	if (p->super_bell >= 0)
		uf_bell_ring(p->super_bell);
}

void uf_pager_set_limit(struct uf_pager *p, uint64_t limit)
{
	pthread_mutex_lock(&p->lock);
	p->limit = limit;
	p->shared.low = true;
	for (uint32_t i = 0; i < p->memories_capacity; i++) {
		struct uf_memory *m = p->memories[i] ? uf_memory_get(p, i) : NULL;
		if (!m)
			continue;
		uf_room(m, 0); // evicts what is over the new limit
		uf_memory_put_locked(m);
	}
	uf_rescan(p); // faults may have waited for room
	uf_fault_thread_kick(p);
	pthread_mutex_unlock(&p->lock);
}

void uf_pager_stats(struct uf_pager *p, struct uf_pager_stats *ret)
{
	pthread_mutex_lock(&p->lock);
	*ret = (struct uf_pager_stats){
		.limit = p->limit,
		.resident = p->resident,
		.resident_peak = p->resident_peak,
		.reserved = p->reserved,
		.memories = p->memories_open,
		.workers_started = p->workers_started,
		.workers_lost = p->workers_lost,
		.requests = p->requests,
		.requests_reissued = p->requests_reissued,
		.running = p->phase == UF_RUNNING,
	};
	for (unsigned i = 0; i < UF_MAX_WORKERS; i++)
		ret->workers_alive += p->workers[i].pid != 0;
	pthread_mutex_unlock(&p->lock);
}

// A reference, or NULL if there is no such memory or it closes.
struct uf_memory *uf_memory_get(struct uf_pager *p, uint32_t id)
{
	struct uf_memory *m = id < p->memories_capacity ? p->memories[id] : NULL;
	if (!m || atomic_load_explicit(&m->closed, memory_order_relaxed))
		return NULL;
	atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed);
	return m;
}

void uf_memory_put_locked(struct uf_memory *m)
{
	// Acquire-release: who frees must see what the others did.
	if (atomic_fetch_sub_explicit(&m->refs, 1, memory_order_acq_rel) == 1)
		uf_memory_free(m);
}

void uf_memory_put(struct uf_memory *m)
{
	struct uf_pager *p = m->pager;
	if (atomic_fetch_sub_explicit(&m->refs, 1, memory_order_acq_rel) == 1) {
		// The creator's reference is gone, so it is closed, and uf_memory_get gives out no new one.
		pthread_mutex_lock(&p->lock);
		uf_memory_free(m);
		pthread_mutex_unlock(&p->lock);
	}
}

int uf_memory_listen(struct uf_memory *m)
{
	struct epoll_event e = {.events = EPOLLIN, .data.u64 = m->id};
	return epoll_ctl(m->pager->epfd, EPOLL_CTL_ADD, m->uffd, &e) ? -errno : 0;
}

// Puts the fault thread where the user wants it. On itself.
static void place(struct uf_pager *p)
{
	int cpu = atomic_load_explicit(&p->cpu, memory_order_relaxed);
	cpu_set_t set;
	CPU_ZERO(&set);
	if (cpu >= 0 && cpu < CPU_SETSIZE) {
		CPU_SET(cpu, &set);
		sched_setaffinity(0, sizeof(set), &set); // one that went away since: anywhere
	}
}

int uf_pager_tune(struct uf_pager *p, int cpu, uint64_t spin_ns)
{
	cpu_set_t caller, wanted;
	if (cpu >= CPU_SETSIZE)
		return -EINVAL;
	if (sched_getaffinity(0, sizeof(caller), &caller))
		return -errno;
	wanted = caller;
	if (cpu >= 0) {
		// Where the caller may not run the kernel may still let a thread of its go: it says so, if it is tried.
		CPU_ZERO(&wanted);
		CPU_SET(cpu, &wanted);
		if (sched_setaffinity(0, sizeof(wanted), &wanted))
			return -errno;
		sched_setaffinity(0, sizeof(caller), &caller);
	}
	int err = 0;
	pthread_mutex_lock(&p->lock);
	if (p->phase == UF_RUNNING)
		err = -pthread_setaffinity_np(p->fault_thread, sizeof(wanted), &wanted);
	if (!err) {
		atomic_store_explicit(&p->cpu, cpu < 0 ? -1 : cpu, memory_order_relaxed);
		atomic_store_explicit(&p->spin_ns, uf_min(spin_ns, 1000000), memory_order_relaxed);
	}
	pthread_mutex_unlock(&p->lock);
	return err;
}

void *uf_fault_thread(void *arg)
{
	struct uf_pager *p = arg;
	uf_thread_name("uf-fault-0");
	place(p);
	bool work = false;
	uint64_t spin_until = 0;
	for (;;) {
		struct epoll_event events[64];
		if (spin_until && uf_now_ns() >= spin_until)
			spin_until = 0;
		int n = epoll_wait(p->epfd, events, 64, work || spin_until ? 0 : -1);
		uint64_t spin = atomic_load_explicit(&p->spin_ns, memory_order_relaxed);
		if (n > 0 && spin)
			spin_until = uf_now_ns() + spin;
		bool bell = false;
		for (int i = 0; i < n; i++) {
			if (events[i].data.u64 == EVENT_BELL) {
				uf_bell_drain(p->bell);
				// Acquire-release, before we look: who finds it set knows that we look after him.
				atomic_exchange_explicit(&p->kicked, false, memory_order_acq_rel);
				bell = true;
				continue;
			}
			pthread_mutex_lock(&p->lock);
			struct uf_memory *m = uf_memory_get(p, (uint32_t)events[i].data.u64);
			pthread_mutex_unlock(&p->lock);
			if (!m)
				continue; // closed since
			uf_fault_drain(p, m);
			uf_memory_put(m);
		}
		if (bell) {
			pthread_mutex_lock(&p->lock);
			bool stop = p->stop_fault;
			pthread_mutex_unlock(&p->lock);
			if (stop)
				break;
			uf_jobs_collect(p);
		}
		if (!work && !atomic_load_explicit(&p->attention, memory_order_relaxed))
			continue;
		pthread_mutex_lock(&p->lock);
		atomic_store_explicit(&p->attention, false, memory_order_relaxed);
		bool pending = p->pending_count, rescan = p->rescan, low = p->low;
		uf_writes_post(p); // a job may be free for what is queued
		pthread_mutex_unlock(&p->lock);
		if (pending)
			uf_pending_retry(p);
		work = (rescan || work) && uf_background_step(p);
		// Room for the next faults, when nobody waits: with work to do the next turn looks at the faults first.
		if (low && !work)
			uf_evict_low(p);
		else if (low)
			atomic_store_explicit(&p->attention, true, memory_order_relaxed);
		// This thread itself may have made room, or freed a job, and nobody rings for that.
		pthread_mutex_lock(&p->lock);
		work |= p->rescan;
		pthread_mutex_unlock(&p->lock);
	}
	return NULL;
}
