/* Threads that help with one job at a time.
 *
 * A job is a row of phases, a phase a number of tasks that may run in any order. Whoever takes part claims
 * tasks from a counter, so a helper that comes late or never is not waited for, only a task that it holds.
 * Nobody spins for long: on a busy machine a waiting thread gives up its core, to the one it waits for.
 */
#ifndef SF_TEAM_H
#define SF_TEAM_H

#include <immintrin.h>
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

enum { MOST_MEMBERS = 64, MOST_PHASES = 256, SPINS = 4000, TOKENS_PER_MEMBER = 24 };

struct job {
    int phases;
    long (*tasks)(const void *context, int phase);
    void (*run)(const void *context, int phase, long task, int member);
    const void *context;
    atomic_long claimed[MOST_PHASES], finished[MOST_PHASES];
};

static struct {
    pthread_mutex_t lock;
    pthread_cond_t called;
    struct job *job;        /* the job that helpers may join, or null */
    unsigned long calls;    /* so that a helper joins each job once */
    int wanted, threads;    /* members wanted besides the caller, threads there are */
    atomic_int helping;
    atomic_flag taken;
} TEAM = {.lock = PTHREAD_MUTEX_INITIALIZER, .called = PTHREAD_COND_INITIALIZER, .taken = ATOMIC_FLAG_INIT};

static void wait_until(atomic_long *counter, long value) {
    for (long spins = 0; atomic_load_explicit(counter, memory_order_acquire) < value; ++spins)
        if (spins < SPINS)
            _mm_pause();
        else
            nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
}

static void take_part(struct job *job, int member) {
    for (int phase = 0; phase < job->phases; ++phase) {
        const long tasks = job->tasks(job->context, phase);
        for (long task; (task = atomic_fetch_add(&job->claimed[phase], 1)) < tasks;) {
            job->run(job->context, phase, task, member);
            atomic_fetch_add_explicit(&job->finished[phase], 1, memory_order_release);
        }
        wait_until(&job->finished[phase], tasks);
    }
}

static void *helper(void *argument) {
    const int member = (int)(long)argument;
    unsigned long seen = 0;
    pthread_mutex_lock(&TEAM.lock);
    for (;;) {
        while (!TEAM.job || TEAM.calls == seen || member > TEAM.wanted) pthread_cond_wait(&TEAM.called, &TEAM.lock);
        struct job *job = TEAM.job;
        seen = TEAM.calls;
        atomic_fetch_add(&TEAM.helping, 1);
        pthread_mutex_unlock(&TEAM.lock);
        take_part(job, member);
        atomic_fetch_sub(&TEAM.helping, 1);
        pthread_mutex_lock(&TEAM.lock);
    }
    return NULL;
}

static void call_helpers(struct job *job, int wanted) {
    pthread_mutex_lock(&TEAM.lock);
    while (TEAM.threads < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, helper, (void *)(long)(TEAM.threads + 1))) break;
        pthread_detach(thread);
        ++TEAM.threads;
    }
    TEAM.job = job;
    TEAM.wanted = wanted;
    ++TEAM.calls;
    pthread_cond_broadcast(&TEAM.called);
    pthread_mutex_unlock(&TEAM.lock);
}

static void dismiss_helpers(void) {
    pthread_mutex_lock(&TEAM.lock);
    TEAM.job = NULL;
    pthread_mutex_unlock(&TEAM.lock);
    while (atomic_load(&TEAM.helping) > 0) _mm_pause();
}

/* Members worth calling for so many tokens: to wake one costs about as long as it takes to do 10 of them. */
static int members_for(long tokens, int members) {
    const long useful = tokens / TOKENS_PER_MEMBER;
    return useful < members ? (useful < 1 ? 1 : (int)useful) : members;
}

/* Rows of a task, `most` at most: few enough for every member to have work, many enough not to fetch the weights
 * too often. */
static long fair_rows(long tokens, int members, long most) {
    if (members < 2) return most;
    const long fair = (tokens + members - 1) / members, half = (tokens + 2 * members - 1) / (2 * members);
    const long least = fair < 16 ? fair : 16;
    return half > most ? most : half < least ? least : half;
}

/* Do the job with up to `members` threads, the caller being member 0; alone if another job has the team. */
static void work(struct job *job, int members) {
    for (int phase = 0; phase < job->phases; ++phase) {
        atomic_init(&job->claimed[phase], 0);
        atomic_init(&job->finished[phase], 0);
    }
    if (members > MOST_MEMBERS) members = MOST_MEMBERS;
    if (members < 2 || atomic_flag_test_and_set(&TEAM.taken)) {
        take_part(job, 0);
        return;
    }
    call_helpers(job, members - 1);
    take_part(job, 0);
    dismiss_helpers();
    atomic_flag_clear(&TEAM.taken);
}

#endif
