/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Several queues of one image, each on its thread. */
#include "util.h"

#include <time.h>

#define THREADS 3
#define ROUNDS 150
#define SIZE (3 * MIB)

struct worker {
    struct mem_host *host;
    struct fvd_image *image;
    struct mem_queue q;
    unsigned index;
    uint64_t seed;
    uint8_t *copy;
};

static uint64_t next(struct worker *w, uint64_t below)
{
    w->seed = w->seed * 6364136223846793005u + 1442695040888963407u;
    return (w->seed >> 33) % below;
}

/* As an event loop does: operations, wake-ups, sleep until woken. */
static int64_t drive(struct worker *w, struct result *r)
{
    struct mem_queue *q = &w->q;
    while (!r->calls) {
        if (run_one(q)) {
            continue;
        }
        pthread_mutex_lock(&q->wake_lock);
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += 30;
        while (!q->woken) {
            /* Nobody woke us for half a minute: a lost wake-up. */
            CHECK_EQ(pthread_cond_timedwait(&q->wake_cond, &q->wake_lock, &until), 0);
        }
        q->woken = false;
        pthread_mutex_unlock(&q->wake_lock);
        fvd_queue_run(q->queue);
    }
    return r->ret;
}

static void *work(void *opaque)
{
    struct worker *w = opaque;
    uint8_t buf[9000], back[9000];
    queue_init(&w->q, w->host, w->image);
    for (int i = 0; i < ROUNDS; i++) {
        /* Threads share blocks, and even sectors: thread t has every third stripe of 1,500 bytes. */
        uint64_t stripe = next(w, SIZE / 1500 / THREADS) * THREADS + w->index;
        uint64_t len = 1 + next(w, 1500), offset = stripe * 1500 + next(w, 1500 - len + 1);
        struct iovec iov = { .iov_base = buf, .iov_len = len };
        struct result r = { 0 };
        for (uint64_t j = 0; j < len; j++) {
            buf[j] = (uint8_t)next(w, 256);
        }
        fvd_submit_write(w->q.queue, offset, &iov, 1, next(w, 8) ? 0 : FVD_REQ_FUA, done, &r);
        CHECK_EQ(drive(w, &r), 0);
        memcpy(w->copy + offset, buf, len);
        if (next(w, 6) == 0) {
            r = (struct result){ 0 };
            fvd_submit_flush(w->q.queue, done, &r);
            CHECK_EQ(drive(w, &r), 0);
        }
        r = (struct result){ 0 };
        iov.iov_base = back;
        iov.iov_len = 1500;
        fvd_submit_read(w->q.queue, stripe * 1500, &iov, 1, 0, done, &r);
        CHECK_EQ(drive(w, &r), 0);
        CHECK(!memcmp(back, w->copy + stripe * 1500, 1500));
    }
    /* Errors are this thread's own (API-15). */
    CHECK_EQ(fvd_queue_is_idle(NULL), -EINVAL);
    CHECK(strstr(fvd_error(), "queue"));
    run(&w->q);
    while (fvd_queue_free(&w->q.queue) == -EBUSY) {
        /* Somebody else's commit may still need this queue. */
        struct timespec nap = { .tv_nsec = 1000000 };
        nanosleep(&nap, NULL);
        run(&w->q);
    }
    pthread_mutex_lock(&w->q.wake_lock);
    w->q.freed = true;
    pthread_mutex_unlock(&w->q.wake_lock);
    return NULL;
}

/* API-11, API-14 */
static void threads(enum mode mode)
{
    struct disk d;
    struct worker workers[THREADS];
    pthread_t ids[THREADS];
    uint8_t *copy = malloc(SIZE), *all = malloc(SIZE);
    CHECK(copy && all);
    disk_start(&d, mode, SIZE, 2 * MIB);
    for (uint64_t i = 0; i < SIZE; i++) {
        copy[i] = i < 2 * MIB ? base_byte(i) : 0;
    }
    /* `done` counts in a global: only order, which nobody looks at here. */
    for (unsigned i = 0; i < THREADS; i++) {
        workers[i] = (struct worker){ .host = &d.host, .image = d.image, .index = i, .seed = i + mode * 10, .copy = copy };
        CHECK_EQ(pthread_create(&ids[i], NULL, work, &workers[i]), 0);
    }
    for (int i = 0; i < THREADS; i++) {
        CHECK_EQ(pthread_join(ids[i], NULL), 0);
    }
    CHECK_EQ(do_flush(&d.q), 0);
    CHECK_EQ(do_read(&d.q, all, SIZE, 0), 0);
    CHECK(!memcmp(all, copy, SIZE));
    CHECK_EQ(do_close(&d.q), 0);
    disk_reopen(&d, 0);
    CHECK_EQ(do_read(&d.q, all, SIZE, 0), 0);
    CHECK(!memcmp(all, copy, SIZE));
    for (int i = 0; i < THREADS; i++) {
        CHECK_EQ(workers[i].q.woken_after_free, 0);
    }
    free(copy);
    free(all);
    disk_end(&d);
}

static void *other_thread(void *opaque)
{
    (void)opaque;
    CHECK(!strcmp(fvd_error(), ""));
    CHECK_EQ(fvd_image_info(NULL, NULL), -EINVAL);
    CHECK(strstr(fvd_error(), "image"));
    return NULL;
}

/* API-15 */
static void error_texts(void)
{
    pthread_t id;
    CHECK_EQ(fvd_queue_is_idle(NULL), -EINVAL);
    CHECK(strstr(fvd_error(), "queue"));
    CHECK_EQ(pthread_create(&id, NULL, other_thread, NULL), 0);
    CHECK_EQ(pthread_join(id, NULL), 0);
    CHECK(strstr(fvd_error(), "queue"));
    /* A call that succeeds leaves it. */
    struct disk d;
    disk_start(&d, INLINE, MIB, 0);
    disk_end(&d);
    CHECK(strstr(fvd_error(), "queue"));
}

int main(void)
{
    error_texts();
    for (enum mode mode = 0; mode < MODES; mode++) {
        threads(mode);
    }
    return 0;
}
