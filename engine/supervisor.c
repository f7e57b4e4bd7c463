// SPDX-License-Identifier: Apache-2.0
// The supervisor thread: spawns workers and reaps them, gives their requests to others, minds deadlines and retries, and
// ends everything when the pager has been idle for long enough. Native, because a Python supervisor could be the very
// thread that waits in a fault.
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "internal.h"

enum {
	QUICK_DEATHS = 3, // deaths of a worker before its first answer, in a row, until it is given up
	LOST_MOST = 16,   // workers that die with a read before it is the read's fault: it may just have been in bad company
};
static const uint64_t stop_ns = 1000000000;

static bool ready(struct uf_pager *p, unsigned index)
{
	struct uf_worker *w = &p->workers[index];
	return w->pid && atomic_load(&p->ring->ready[index]) == (uint32_t)w->pid;
}

static bool other_ready(struct uf_pager *p, unsigned index)
{
	for (unsigned i = 0; i < p->options.workers; i++)
		if (i != index && ready(p, i))
			return true;
	return false;
}

static void signal_worker(struct uf_worker *w, int number)
{
	// By pidfd: the program's own waitpid(-1) may have reaped it, and the number be somebody else's.
	if (w->pidfd >= 0)
		syscall(SYS_pidfd_send_signal, w->pidfd, number, NULL, 0);
	else if (w->pid)
		kill(w->pid, number);
}

// Fails every request that waits in the ring for this worker, or for any if there is no other. Lock held; drops it.
static void fail_queued(struct uf_pager *p, unsigned worker, const char *why)
{
	for (unsigned i = 0; i < UF_JOBS; i++) {
		struct uf_job *j = &p->jobs[i];
		struct uf_ring_entry *e = &p->ring->entry[i];
		uint64_t word = atomic_load_explicit(&e->word, memory_order_acquire);
		if (j->state != UF_JOB_RING || UF_CLAIM_STATE(word) != UF_ENTRY_QUEUED ||
		    (j->target == UF_ANY_WORKER ? other_ready(p, worker) : j->target != worker))
			continue;
		if (!atomic_compare_exchange_strong(&e->word, &word, UF_CLAIM(UF_ENTRY_FREE, 0, UF_CLAIM_GENERATION(word))))
			continue;
		j->state = UF_JOB_RUNNING;
		if (!j->memory) {
			j->result = -ECHILD;
			snprintf(j->message, sizeof(j->message), "%s", why);
			pthread_cond_broadcast(&p->changed);
			continue;
		}
		pthread_mutex_unlock(&p->lock);
		uf_job_failed(j, -ECHILD, why);
		pthread_mutex_lock(&p->lock);
	}
}

// Gives up on a worker that does not come up. The next request tries again, after a pause.
static void gave_up(struct uf_pager *p, unsigned index, const char *why)
{
	struct uf_worker *w = &p->workers[index];
	uf_log("worker %u does not start: %s", index, why);
	w->wanted = false;
	w->quick_deaths = QUICK_DEATHS - 1;
	w->failure.err = -ECHILD;
	snprintf(w->failure.message, sizeof(w->failure.message), "%s", why);
	pthread_cond_broadcast(&p->changed);
	fail_queued(p, index, why);
}

// Lock held; drops it while it spawns.
static void start_worker(struct uf_pager *p, unsigned index, uint64_t now)
{
	struct uf_worker *w = &p->workers[index];
	int fds[3] = {p->ring_fd, p->blob_fd, p->bell};
	pid_t pid = 0;
	pthread_mutex_unlock(&p->lock);
	int err = uf_worker_spawn(p, index, fds, &pid);
	int pidfd = err ? -1 : uf_high_fd((int)syscall(SYS_pidfd_open, pid, 0));
	pthread_mutex_lock(&p->lock);
	if (err) {
		char why[UF_MESSAGE_MAX];
		snprintf(why, sizeof(why), "cannot run %s: %s", p->worker_argv[0], strerrordesc_np(-err));
		w->not_before_ns = now + 1000000000;
		gave_up(p, index, why);
		return;
	}
	w->pid = pid;
	w->pidfd = pidfd;
	w->killed_ns = 0;
	w->answered = false;
	w->started_ns = uf_now_ns();
	p->workers_started++;
}

// Requests that a dead worker had taken go back to the queue: it can no longer write into their slots.
static void reissue(struct uf_pager *p, unsigned worker, const char *why)
{
	for (unsigned i = 0; i < UF_JOBS; i++) {
		struct uf_job *j = &p->jobs[i];
		struct uf_ring_entry *e = &p->ring->entry[i];
		uint64_t word = atomic_load_explicit(&e->word, memory_order_acquire);
		if (UF_CLAIM_STATE(word) != UF_ENTRY_TAKEN || UF_CLAIM_WORKER(word) != worker)
			continue;
		atomic_store_explicit(&e->word, UF_CLAIM(UF_ENTRY_FREE, 0, UF_CLAIM_GENERATION(word)), memory_order_release);
		if (j->state != UF_JOB_RING)
			continue;
		p->requests_reissued++;
		struct uf_memory *m = j->memory;
		bool too_often = ++j->lost >= LOST_MOST;
		if (!m && (j->abandoned || j->lost >= 2 || j->asked == UF_REQUEST_FLUSH)) {
			if (j->abandoned) {
				j->state = UF_JOB_FREE;
				p->jobs_used--;
				uf_job_freed(p);
			} else {
				j->state = UF_JOB_RUNNING;
				j->result = -ECHILD;
				snprintf(j->message, sizeof(j->message), "the worker that %s it %.300s",
					 j->asked == UF_REQUEST_FLUSH ? "flushed" : "loaded", why);
			}
			pthread_cond_broadcast(&p->changed);
		} else if (!m) {
			uf_job_dispatch(p, j);
		} else if (atomic_load_explicit(&m->closed, memory_order_relaxed)) {
			struct uf_slot *slot = j->slot;
			uf_job_free(j);
			if (slot)
				uf_slot_done(slot, -ECANCELED, "the memory was closed");
		} else if (j->late) {
			// A try that failed, like any other; the worker's other reads were in bad company.
			j->late = false;
			j->state = UF_JOB_RUNNING;
			pthread_mutex_unlock(&p->lock);
			uf_job_failed(j, -ETIMEDOUT, "the source did not answer before the deadline");
			pthread_mutex_lock(&p->lock);
		} else if (too_often) {
			char message[UF_MESSAGE_MAX];
			snprintf(message, sizeof(message), "%d workers died while they read it; the last one %.200s", LOST_MOST, why);
			j->state = UF_JOB_RUNNING;
			j->tries = p->options.attempts - 1;
			pthread_mutex_unlock(&p->lock);
			uf_job_failed(j, -ECHILD, message);
			pthread_mutex_lock(&p->lock);
		} else {
			uf_job_dispatch(p, j);
		}
	}
}

// Lock held; may drop it.
static void reap(struct uf_pager *p, unsigned index)
{
	struct uf_worker *w = &p->workers[index];
	int status = 0;
	pid_t pid = waitpid(w->pid, &status, WNOHANG);
	// ECHILD is an answer: SIGCHLD is ignored, or the program's own waitpid(-1) was faster. The pidfd tells all the same.
	if (pid == 0)
		return;
	if (pid < 0) {
		struct pollfd f = {w->pidfd, POLLIN, 0};
		if (w->pidfd >= 0 && poll(&f, 1, 0) == 0)
			return;
		status = -1;
	}
	uint64_t now = uf_now_ns();
	bool quick = !w->answered && !w->killed_ns;
	char why[UF_MESSAGE_MAX];
	if (status == -1)
		snprintf(why, sizeof(why), "ended");
	else if (WIFSIGNALED(status))
		snprintf(why, sizeof(why), "was killed by signal %d%s", WTERMSIG(status),
			 w->killed_ns ? " (by userfault: it kept a read longer than the deadline)" : "");
	else
		snprintf(why, sizeof(why), "ended with exit status %d", WEXITSTATUS(status));
	if (!quick)
		uf_log("worker %u (pid %d) %s; its requests are issued again.", index, (int)w->pid, why);
	if (w->pidfd >= 0)
		close(w->pidfd);
	w->pidfd = -1;
	w->pid = 0;
	p->workers_lost++;
	w->quick_deaths = quick ? w->quick_deaths + 1 : 0;
	w->not_before_ns = quick ? now + (10000000ULL << uf_min(w->quick_deaths, 7)) : 0;
	bool hopeless = w->quick_deaths >= QUICK_DEATHS;
	reissue(p, index, why);
	uf_fault_thread_kick(p); // it may have answered and not rung
	if (hopeless) {
		char text[UF_MESSAGE_MAX];
		snprintf(text, sizeof(text), "the worker process %.300s, %d times in a row, before it answered anything", why,
			 QUICK_DEATHS);
		gave_up(p, index, text);
	}
}

// A killed worker that does not die (it hangs in the kernel, on a dead network file system) keeps its slot, but not the
// read: that goes to another job. The old one is freed when the process is gone. Lock held; drops it.
static void retire(struct uf_pager *p, struct uf_job *old)
{
	for (unsigned i = 0; i < UF_JOBS && p->jobs_used < UF_JOBS; i++) {
		struct uf_job *j = &p->jobs[i];
		if (j->state != UF_JOB_FREE)
			continue;
		*j = *old;
		p->jobs_used++;
		*old = (struct uf_job){.state = UF_JOB_RING, .kind = UF_TRACE_DEMAND, .abandoned = true, .posted_ns = uf_now_ns()};
		j->late = false;
		j->state = UF_JOB_RUNNING;
		p->requests_reissued++;
		pthread_mutex_unlock(&p->lock);
		uf_job_failed(j, -ETIMEDOUT, "the source did not answer before the deadline"); // a try like any other
		pthread_mutex_lock(&p->lock);
		return;
	}
}

// Kills workers that keep a read for too long, or a load that nobody waits for any more, or do not come up. Lock held;
// returns when the next of them is due.
static uint64_t mind_deadlines(struct uf_pager *p, uint64_t now)
{
	uint64_t next = UINT64_MAX;
	for (unsigned i = 0; i < UF_JOBS; i++) {
		struct uf_job *j = &p->jobs[i];
		struct uf_ring_entry *e = &p->ring->entry[i];
		uint64_t word = atomic_load_explicit(&e->word, memory_order_acquire);
		uint64_t taken = atomic_load_explicit(&e->taken_ns, memory_order_relaxed); // 0: just now
		if (j->state != UF_JOB_RING || (!j->memory && !j->abandoned) || UF_CLAIM_STATE(word) != UF_ENTRY_TAKEN)
			continue;
		struct uf_worker *w = &p->workers[UF_CLAIM_WORKER(word) % UF_MAX_WORKERS];
		uint64_t since = taken ? uf_max(taken, j->posted_ns) : now;
		uint64_t due = j->abandoned ? now : uf_min(since, now) + p->options.deadline_ns;
		if (due > now) {
			next = uf_min(next, due);
		} else if (w->pid && !w->killed_ns) {
			w->killed_ns = now;
			j->late = true;
			signal_worker(w, SIGKILL);
		} else if (w->pid && j->memory && now - w->killed_ns > stop_ns) {
			retire(p, j);
		}
	}
	for (unsigned i = 0; i < p->options.workers; i++) {
		struct uf_worker *w = &p->workers[i];
		if (!w->pid || w->killed_ns || ready(p, i))
			continue;
		uint64_t due = w->started_ns + p->options.deadline_ns;
		if (due <= now) {
			w->killed_ns = now;
			signal_worker(w, SIGKILL);
		}
		next = uf_min(next, due);
	}
	return next;
}

void uf_workers_forget(struct uf_pager *p)
{
	for (unsigned i = 0; i < UF_MAX_WORKERS; i++) {
		if (p->workers[i].pidfd >= 0)
			close(p->workers[i].pidfd);
		p->workers[i] = (struct uf_worker){.pidfd = -1};
	}
}

static void end_workers(struct uf_pager *p)
{
	if (!p->ring)
		return;
	atomic_store(&p->ring->stop, 1);
	atomic_fetch_add(&p->ring->posted, 1);
	uf_futex_wake(&p->ring->posted, INT32_MAX);
	uint64_t deadline = uf_now_ns() + stop_ns;
	for (unsigned i = 0; i < UF_MAX_WORKERS; i++) {
		struct uf_worker *w = &p->workers[i]; // only this thread changes them
		if (!w->pid)
			continue;
		struct pollfd f = {w->pidfd, POLLIN, 0};
		uint64_t now = uf_now_ns();
		if (w->pidfd < 0 || now >= deadline || poll(&f, 1, (int)((deadline - now) / 1000000) + 1) == 0) {
			signal_worker(w, SIGKILL);
			poll(&f, w->pidfd >= 0, (int)(stop_ns / 1000000)); // one that hangs in the kernel is left to init
		}
		waitpid(w->pid, NULL, w->pidfd >= 0 ? WNOHANG : 0);
	}
	pthread_mutex_lock(&p->lock);
	uf_workers_forget(p);
	pthread_mutex_unlock(&p->lock);
}

// Lock held on entry and return. Nobody holds the pager: no memory is open, no source lives.
static void tear_down(struct uf_pager *p)
{
	p->phase = UF_STOPPING;
	p->stop_fault = p->stop_io = true;
	uf_fault_thread_kick(p);
	pthread_cond_broadcast(&p->io_work);
	pthread_mutex_unlock(&p->lock);
	pthread_join(p->fault_thread, NULL);
	for (unsigned i = 0; i < p->io_started; i++)
		pthread_join(p->io_threads[i], NULL);
	end_workers(p);
	pthread_mutex_lock(&p->lock);
	p->io_started = 0;
	for (unsigned i = 0; i < UF_JOBS; i++)
		while (p->jobs[i].state == UF_JOB_RUNNING) // a thread that prefetches in a closed memory installs it
			uf_wait_changed(p, 1);
	for (unsigned i = 0; i < UF_JOBS; i++) { // of memories that were closed while a worker read for them
		struct uf_job *j = &p->jobs[i];
		if (j->state == UF_JOB_FREE)
			continue;
		if (j->memory) {
			uf_job_free(j);
		} else {
			j->state = UF_JOB_FREE;
			p->jobs_used--;
		}
	}
	for (unsigned i = 0; i < UF_SLOTS; i++) {
		struct uf_slot *s = &p->slots[i];
		// A flush or an eviction of a memory that was closed meanwhile still holds it.
		while (s->state == UF_SLOT_FILLING || s->state == UF_SLOT_ENDING || (s->state != UF_SLOT_FREE && s->restoring))
			uf_wait_changed(p, 1);
		if (s->state != UF_SLOT_FREE)
			uf_slot_free(s);
	}
	p->pending_count = p->repairs_count = 0;
	uf_stash_deinit(p);
	uf_direct_deinit(p);
	uf_ring_destroy(p);
	uf_staging_deinit(&p->fault_staging);
	uf_pager_close_fds(p);
	p->phase = UF_IDLE;
	pthread_cond_broadcast(&p->changed);
}

void *uf_super_thread(void *arg)
{
	struct uf_pager *p = arg;
	uf_thread_name("uf-super");
	pthread_mutex_lock(&p->lock);
	for (;;) {
		uint64_t now = uf_now_ns(), next = UINT64_MAX;
		if (!p->holders) {
			uint64_t end = p->idle_since_ns + p->options.linger_ns;
			if (p->stop_super || now >= end)
				break;
			next = end;
		}
		if (p->ring) {
			for (unsigned i = 0; i < p->options.workers; i++) {
				struct uf_worker *w = &p->workers[i];
				if (w->pid)
					reap(p, i);
				if (w->failure.err && w->answered)
					w->failure.err = 0; // it came up after all
				if (!w->pid && w->wanted) {
					if (w->not_before_ns <= now)
						start_worker(p, i, now);
					else
						next = uf_min(next, w->not_before_ns);
				}
			}
			next = uf_min(next, mind_deadlines(p, now));
		}
		next = uf_min(next, uf_jobs_due(p, now));
		next = uf_min(next, uf_writes_due(p, now));

		struct pollfd fds[1 + UF_MAX_WORKERS] = {{p->super_bell, POLLIN, 0}};
		nfds_t n = 1;
		for (unsigned i = 0; i < UF_MAX_WORKERS; i++)
			if (p->workers[i].pid && p->workers[i].pidfd >= 0)
				fds[n++] = (struct pollfd){p->workers[i].pidfd, POLLIN, 0};
		bool busy = p->jobs_used; // a read may be taken any time, and its deadline starts then
		int bell = p->super_bell;
		pthread_mutex_unlock(&p->lock);
		now = uf_now_ns();
		int timeout = next == UINT64_MAX ? -1 : next <= now ? 0 : (int)uf_min((next - now) / 1000000 + 1, 3600000);
		if (busy && (timeout < 0 || timeout > 1000))
			timeout = 1000;
		poll(fds, n, timeout);
		uf_bell_drain(bell);
		pthread_mutex_lock(&p->lock);
	}
	tear_down(p);
	pthread_mutex_unlock(&p->lock);
	return NULL;
}
