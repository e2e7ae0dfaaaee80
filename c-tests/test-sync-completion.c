/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Hosts that complete at once: order of calls, and depth of the stack. */
#include "util.h"

/* API-16, API-17: all of it within submit. */
static void within_submit(void)
{
    struct disk d;
    struct result r = { 0 };
    char buf[5000] = { 1 };
    struct iovec iov = { .iov_base = buf, .iov_len = sizeof(buf) };
    disk_start(&d, INLINE, 4 * MIB, MIB);
    fvd_submit_write(d.q.queue, 100, &iov, 1, 0, done, &r);
    CHECK_EQ(r.calls, 1);
    CHECK_EQ(r.ret, 0);
    r.calls = 0;
    fvd_submit_flush(d.q.queue, done, &r);
    CHECK_EQ(r.calls, 1);
    CHECK_EQ(fvd_queue_is_idle(d.q.queue), 1);
    disk_end(&d);
}

/* A chain of requests, each submitted by the one before when it is done. */
struct chain {
    struct result r;
    struct mem_queue *q;
    struct iovec iov;
    char buf[512];
    unsigned left;
    uint64_t step, offset;
    bool write;
    char *lowest, *start;
};

static void chain_next(struct result *r)
{
    struct chain *c = (struct chain *)r;
    char here;
    if (&here < c->lowest) {
        c->lowest = &here;
    }
    CHECK_EQ(r->ret, 0);
    if (c->left-- == 0) {
        return;
    }
    c->offset = (c->offset + c->step) % (4 * MIB);
    if (c->write) {
        fvd_submit_write(c->q->queue, c->offset, &c->iov, 1, 0, done, r);
    } else {
        fvd_submit_read(c->q->queue, c->offset, &c->iov, 1, 0, done, r);
    }
}

static size_t chain_depth(struct disk *d, unsigned count, bool write, uint64_t step)
{
    char here;
    struct chain c = { .r = { .then = chain_next }, .q = &d->q, .left = count, .step = step,
                       .write = write, .lowest = &here, .start = &here };
    c.iov = (struct iovec){ .iov_base = c.buf, .iov_len = sizeof(c.buf) };
    chain_next(&c.r);
    run(&d->q);
    CHECK_EQ(c.r.calls, count);
    return (size_t)(c.start - c.lowest);
}

/* API-18: 20,000 requests in a chain need no more stack than 10. */
static void long_chains(enum mode mode)
{
    struct disk d;
    disk_start(&d, mode, 4 * MIB, MIB);
    for (int write = 0; write < 2; write++) {
        /* 512 bytes in the base (the engine's way) and past it (pass-through). */
        for (uint64_t step = 512; step <= 4096; step *= 8) {
            size_t few = chain_depth(&d, 10, write, step);
            size_t many = chain_depth(&d, 20000, write, step);
            CHECK(many <= few + 4096);
        }
    }
    disk_end(&d);
}

static void complete_one(struct result *r)
{
    struct mem_queue *q = r->opaque;
    run_one(q);
}

/* API-18: done may complete operations. */
static void completing_in_done(enum mode mode)
{
    struct disk d;
    struct result r[16] = { { 0 } };
    static char buf[16][4096];
    struct iovec iov[16];
    disk_start(&d, mode, 4 * MIB, MIB);
    for (int i = 0; i < 16; i++) {
        r[i].then = complete_one;
        r[i].opaque = &d.q;
        iov[i] = (struct iovec){ .iov_base = buf[i], .iov_len = sizeof(buf[i]) };
        if (i % 2) {
            fvd_submit_read(d.q.queue, (uint64_t)i * 100 * KIB, &iov[i], 1, 0, done, &r[i]);
        } else {
            fvd_submit_write(d.q.queue, (uint64_t)i * 100 * KIB, &iov[i], 1, 0, done, &r[i]);
        }
    }
    run(&d.q);
    for (int i = 0; i < 16; i++) {
        CHECK_EQ(r[i].calls, 1);
        CHECK_EQ(r[i].ret, 0);
    }
    disk_end(&d);
}

int main(void)
{
    within_submit();
    for (enum mode mode = 0; mode < MODES; mode++) {
        long_chains(mode);
        completing_in_done(mode);
    }
    return 0;
}
