/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Many requests at once, completed in any order. */
#include "util.h"

#define COUNT 200

/* API-19, API-20 */
static void any_order(enum mode mode)
{
    struct disk d;
    static struct result r[COUNT];
    static uint8_t buf[COUNT][3000], back[COUNT][3000];
    static struct iovec iov[COUNT];
    bool reordered = false;
    memset(r, 0, sizeof(r));
    disk_start(&d, mode, 4 * MIB, 2 * MIB);
    /* Neighbours share blocks and sectors: parts of one block come from several requests. */
    for (int i = 0; i < COUNT; i++) {
        memset(buf[i], i + 1, sizeof(buf[i]));
        iov[i] = (struct iovec){ .iov_base = buf[i], .iov_len = sizeof(buf[i]) };
        fvd_submit_write(d.q.queue, (uint64_t)i * 3000 + 77, &iov[i], 1, i % 5 ? 0 : FVD_REQ_FUA, done, &r[i]);
        if (i % 50 == 49) {
            struct result flush = { 0 };
            fvd_submit_flush(d.q.queue, done, &flush);
            CHECK_EQ(wait_for(&d.q, &flush), 0);
        }
    }
    run(&d.q);
    for (int i = 0; i < COUNT; i++) {
        CHECK_EQ(r[i].calls, 1);
        CHECK_EQ(r[i].ret, 0);
        reordered |= i > 0 && r[i].order < r[i - 1].order;
    }
    CHECK(mode != REVERSED || reordered);
    memset(r, 0, sizeof(r));
    for (int i = 0; i < COUNT; i++) {
        iov[i].iov_base = back[i];
        fvd_submit_read(d.q.queue, (uint64_t)i * 3000 + 77, &iov[i], 1, 0, done, &r[i]);
    }
    run(&d.q);
    for (int i = 0; i < COUNT; i++) {
        CHECK_EQ(r[i].calls, 1);
        CHECK_EQ(r[i].ret, 0);
        CHECK(!memcmp(back[i], buf[i], sizeof(buf[i])));
    }
    check_base(&d.q, 77, 0);
    disk_end(&d);
}

/* API-23: tokens that are not under way. */
static void wrong_tokens(void)
{
    struct disk d;
    struct result r = { 0 };
    char buf[4096];
    struct iovec iov = { .iov_base = buf, .iov_len = sizeof(buf) };
    disk_start(&d, QUEUED, MIB, MIB);
    fvd_complete(d.q.queue, 0, 0);
    CHECK(strstr(fvd_error(), "0x0"));
    fvd_complete(d.q.queue, 0xffffffffffffffff, 0);
    CHECK(strstr(fvd_error(), "0xffffffffffffffff"));

    fvd_submit_read(d.q.queue, 0, &iov, 1, 0, done, &r);
    CHECK(d.q.first);
    uint64_t token = d.q.first->token;
    fvd_complete(d.q.queue, token + ((uint64_t)1 << 32), 0);
    fvd_complete(d.q.queue, token + 1, 0);
    CHECK_EQ(r.calls, 0);
    CHECK_EQ(wait_for(&d.q, &r), 0);
    /* Twice. */
    fvd_complete(d.q.queue, token, -EIO);
    CHECK_EQ(r.calls, 1);
    CHECK_EQ(fvd_queue_is_idle(d.q.queue), 1);
    check_base(&d.q, MIB, 0);
    disk_end(&d);
}

int main(void)
{
    for (enum mode mode = 0; mode < MODES; mode++) {
        any_order(mode);
    }
    wrong_tokens();
    return 0;
}
