/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* API-36, API-37, API-58: images that became unusable. */
#include "util.h"

static void check_poisoned(struct disk *d)
{
    struct fvd_info info = { .struct_size = sizeof(info) };
    struct fvd_mapping map;
    CHECK_EQ(fvd_image_info(d->image, &info), 0);
    CHECK(info.flags & FVD_INFO_POISONED);
    CHECK_EQ(do_fill(&d->q, 3, 4096, 12288), -EIO);
    CHECK_EQ(do_fill(&d->q, 3, 4096, 0), -EIO);
    CHECK_EQ(do_flush(&d->q), -EIO);
    CHECK_EQ(do_write_zeroes(&d->q, 0, 4096, 0), -EIO);
    CHECK_EQ(do_resize(&d->q, 8 * MIB, 0), -EIO);
    CHECK_EQ(fvd_lookup(d->image, 0, 0, 4096, FVD_LOOKUP_WRITE, &map), FVD_LOOKUP_ASK);
}

static void failed_flush(enum mode mode)
{
    struct disk d;
    disk_start(&d, mode, 2 * MIB, MIB);
    CHECK_EQ(do_fill(&d.q, 1, 4096, 0), 0);
    CHECK_EQ(do_flush(&d.q), 0);
    CHECK_EQ(do_fill(&d.q, 2, 4096, 8192), 0);
    d.host.fail_kind = FLUSH;
    d.host.fail_errno = EIO;
    CHECK_EQ(do_flush(&d.q), -EIO);
    /* One that succeeds later must not hide it. */
    d.host.fail_errno = 0;
    check_poisoned(&d);
    /* Reads go on, also by lookup. */
    struct fvd_mapping map;
    check_bytes(&d.q, 1, 4096, 0);
    check_base(&d.q, 4096, 4096);
    CHECK_EQ(fvd_lookup(d.image, 0, 0, 4096, 0, &map), FVD_LOOKUP_DATA);
    fvd_end(d.image, map.token);
    CHECK_EQ(do_close(&d.q), -EIO);
    disk_crash_and_reopen(&d);
    check_bytes(&d.q, 1, 4096, 0);
    check_base(&d.q, 4096, 4096);
    CHECK_EQ(do_fill(&d.q, 3, 4096, 12288), 0);
    disk_end(&d);
}

/* A mistake of the host's that the library notices inside (a panic): nothing else breaks. */
static void panic_in_end(enum mode mode)
{
    struct disk d;
    struct fvd_mapping map;
    disk_start(&d, mode, 2 * MIB, MIB);
    CHECK_EQ(do_fill(&d.q, 1, 4096, 0), 0);
    CHECK_EQ(do_flush(&d.q), 0);
    CHECK_EQ(fvd_lookup(d.image, 0, 0, 4096, 0, &map), FVD_LOOKUP_DATA);
    fvd_end(d.image, map.token);
    fvd_end(d.image, map.token);
    CHECK(strstr(fvd_error(), "internal error"));
    check_poisoned(&d);
    queue_free(&d.q);
    fvd_image_free(&d.image);
    d.image = image_new(&d.host, 0);
    queue_init(&d.q, &d.host, d.image);
    CHECK_EQ(do_open(&d.q), 0);
    check_bytes(&d.q, 1, 4096, 0);
    disk_end(&d);
}

/*
 * A panic while requests are under way: theirs is -EIO, but only when the host has completed their
 * operations, and exactly once. Provoked by ending the library's own bracket behind its back.
 */
static void panic_with_requests(enum mode mode)
{
    struct disk d;
    struct result r[6] = { { 0 } };
    static uint8_t buf[6][4096];
    struct iovec iov[6];
    disk_start(&d, mode, 2 * MIB, MIB);
    CHECK_EQ(do_fill(&d.q, 1, 64 * KIB, 0), 0);
    for (int i = 0; i < 6; i++) {
        iov[i] = (struct iovec){ .iov_base = buf[i], .iov_len = sizeof(buf[i]) };
        /* Half of them pass through, half are the engine's. */
        uint64_t offset = i % 2 ? (uint64_t)i * 4096 : 512 * KIB + (uint64_t)i * 4096;
        fvd_submit_read(d.q.queue, offset, &iov[i], 1, 0, done, &r[i]);
    }
    for (uint32_t token = 0; token < 32; token++) {
        /* As often as requests pass through: the library's own end is then one too many. */
        for (int i = 0; i < 3; i++) {
            fvd_end(d.image, token);
        }
    }
    unsigned answered = 0, under_way = 6;
    while (d.q.first) {
        for (int i = 0; i < 6; i++) {
            answered += (unsigned)r[i].calls;
        }
        CHECK(answered < 6);
        answered = 0;
        CHECK_EQ(fvd_queue_is_idle(d.q.queue), 0);
        CHECK_EQ(fvd_queue_free(&d.q.queue), -EBUSY);
        CHECK(run_one(&d.q));
        under_way--;
    }
    CHECK_EQ(under_way, 0);
    unsigned failed = 0;
    for (int i = 0; i < 6; i++) {
        CHECK_EQ(r[i].calls, 1);
        CHECK(r[i].ret == 0 || r[i].ret == -EIO);
        failed += r[i].ret != 0;
    }
    CHECK(failed > 0);
    /* This queue is lost; it fails at once, and can be freed. */
    uint8_t byte;
    CHECK_EQ(do_read(&d.q, &byte, 1, 0), -EIO);
    CHECK_EQ(do_close(&d.q), -EIO);
    fvd_queue_run(d.q.queue);
    fvd_queue_timer(d.q.queue);
    disk_reopen(&d, 0);
    check_base(&d.q, 64 * KIB, 512 * KIB);
    disk_end(&d);
}

int main(void)
{
    for (enum mode mode = 0; mode < MODES; mode++) {
        failed_flush(mode);
        panic_in_end(mode);
        if (mode != INLINE) {
            panic_with_requests(mode);
        }
    }
    return 0;
}
