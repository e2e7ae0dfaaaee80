/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* API-24, API-25: two that want the same step, and work that comes too late. */
#include "util.h"

static void twice(enum mode mode)
{
    struct mem_host host;
    struct mem_queue q;
    struct result a = { 0 }, b = { 0 };
    mem_host_init(&host, mode);
    struct fvd_image *image = image_new(&host, 0);
    queue_init(&q, &host, image);
    CHECK_EQ(do_create(&q, MIB, NULL), 0);
    fvd_submit_open(q.queue, done, &a);
    fvd_submit_open(q.queue, done, &b);
    run(&q);
    CHECK(a.calls == 1 && b.calls == 1);
    CHECK_EQ(a.ret, 0);
    CHECK_EQ(b.ret, -EBUSY);
    a = b = (struct result){ 0 };
    fvd_submit_close(q.queue, done, &a);
    fvd_submit_close(q.queue, done, &b);
    run(&q);
    CHECK(a.calls == 1 && b.calls == 1);
    CHECK_EQ(a.ret, 0);
    CHECK_EQ(b.ret, -EBUSY);
    queue_free(&q);
    fvd_image_free(&image);
    mem_host_free(&host);
}

/* A bracket that a lookup opened holds up the close. */
static void bracket(void)
{
    struct disk d;
    struct result r = { 0 };
    struct fvd_mapping map;
    disk_start(&d, QUEUED, MIB, 0);
    CHECK_EQ(do_fill(&d.q, 1, 4096, 0), 0);
    CHECK_EQ(fvd_lookup(d.image, 3, 0, 4096, FVD_LOOKUP_WRITE, &map), FVD_LOOKUP_DATA);
    fvd_submit_close(d.q.queue, done, &r);
    run(&d.q);
    CHECK_EQ(r.calls, 0);
    /* Closing already: nothing new. */
    struct fvd_mapping late;
    CHECK_EQ(fvd_lookup(d.image, 3, 0, 4096, 0, &late), FVD_LOOKUP_ASK);
    fvd_end(d.image, map.token);
    CHECK_EQ(wait_for(&d.q, &r), 0);
    disk_end(&d);
}

/* A close that fails closes. */
static void failing_close(enum mode mode)
{
    struct disk d;
    char buf[512];
    disk_start(&d, mode, MIB, MIB);
    CHECK_EQ(do_fill(&d.q, 1, 4096, 0), 0);
    d.host.fail_kind = WRITE;
    d.host.fail_errno = ENOSPC;
    CHECK(do_close(&d.q) < 0);
    d.host.fail_errno = 0;
    CHECK_EQ(do_read(&d.q, buf, sizeof(buf), 0), -EBUSY);
    CHECK_EQ(do_close(&d.q), -EBUSY);
    /* The next open recovers. */
    disk_reopen(&d, 0);
    check_base(&d.q, MIB - 4096, 4096);
    disk_end(&d);
}

int main(void)
{
    for (enum mode mode = 0; mode < MODES; mode++) {
        twice(mode);
        failing_close(mode);
    }
    bracket();
    return 0;
}
