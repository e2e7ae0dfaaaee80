/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Durability. */
#include "util.h"

/* API-39: flushed and FUA writes survive a power failure. */
static void survives(enum mode mode, uint32_t limit_flags)
{
    struct disk d;
    memset(&d, 0, sizeof(d));
    mem_host_init(&d.host, mode);
    d.host.limits.flags = limit_flags;
    if (!(limit_flags & FVD_LIMIT_GROWS_ZEROED)) {
        mem_host_device(&d.host, 8 * MIB);
    }
    mem_host_base(&d.host, MIB);
    d.image = image_new(&d.host, 0);
    queue_init(&d.q, &d.host, d.image);
    CHECK_EQ(do_create(&d.q, 2 * MIB, "base.raw"), 0);
    CHECK_EQ(do_open(&d.q), 0);

    CHECK_EQ(do_fill(&d.q, 1, 4096, 8192), 0);
    CHECK_EQ(do_flush(&d.q), 0);
    char buf[4096];
    memset(buf, 2, sizeof(buf));
    /* A block of the base, an overwrite, and a place past the base. */
    CHECK_EQ(do_write(&d.q, buf, 4096, 64 * KIB, FVD_REQ_FUA), 0);
    CHECK_EQ(do_write(&d.q, buf, 512, 8192, FVD_REQ_FUA), 0);
    CHECK_EQ(do_write(&d.q, buf, 1024, MIB + 512, FVD_REQ_FUA), 0);
    /* API-48: FUA goes through where the host can do it, and never where it cannot. */
    if (!(limit_flags & FVD_LIMIT_CAN_FUA)) {
        CHECK_EQ(d.host.fua_writes, 0);
    }
    CHECK_EQ(do_write_zeroes(&d.q, 128 * KIB, 4096, FVD_REQ_FUA), 0);
    /* Not flushed: either state is right, but nothing else. */
    CHECK_EQ(do_fill(&d.q, 3, 4096, 256 * KIB), 0);

    disk_crash_and_reopen(&d);
    check_bytes(&d.q, 2, 512, 8192);
    check_bytes(&d.q, 1, 4096 - 512, 8192 + 512);
    check_bytes(&d.q, 2, 4096, 64 * KIB);
    check_bytes(&d.q, 2, 1024, MIB + 512);
    check_bytes(&d.q, 0, 4096, 128 * KIB);
    check_base(&d.q, 8192, 0);
    uint8_t byte = 0;
    CHECK_EQ(do_read(&d.q, &byte, 1, 256 * KIB), 0);
    CHECK(byte == 3 || byte == base_byte(256 * KIB));
    disk_end(&d);
}

/* API-39: one FUA request, and the power fails right after. Nothing else makes it durable. */
static void fua_alone(enum mode mode, uint32_t limit_flags, uint64_t offset, bool zeroes)
{
    struct disk d;
    char buf[4096];
    memset(&d, 0, sizeof(d));
    mem_host_init(&d.host, mode);
    d.host.limits.flags = limit_flags;
    mem_host_base(&d.host, MIB);
    d.image = image_new(&d.host, 0);
    queue_init(&d.q, &d.host, d.image);
    CHECK_EQ(do_create(&d.q, 2 * MIB, "base.raw"), 0);
    CHECK_EQ(do_open(&d.q), 0);
    CHECK_EQ(do_fill(&d.q, 1, 4096, 8192), 0);
    CHECK_EQ(do_fill(&d.q, 1, 4096, MIB + 8192), 0);
    CHECK_EQ(do_flush(&d.q), 0);
    mem_host_reset_counts(&d.host);
    memset(buf, 2, sizeof(buf));
    if (zeroes) {
        CHECK_EQ(do_write_zeroes(&d.q, offset, 4096, FVD_REQ_FUA), 0);
    } else {
        CHECK_EQ(do_write(&d.q, buf, 4096, offset, FVD_REQ_FUA), 0);
    }
    /* By the host's FUA, or by a flush. */
    CHECK(d.host.fua_writes + d.host.ops[FLUSH] > 0);
    disk_crash_and_reopen(&d);
    check_bytes(&d.q, zeroes ? 0 : 2, 4096, offset);
    disk_end(&d);
}

/* A flush with nothing to make durable costs at most the host's flush. */
static void idle_flush(enum mode mode)
{
    struct disk d;
    disk_start(&d, mode, MIB, MIB);
    CHECK_EQ(do_fill(&d.q, 1, 4096, 0), 0);
    CHECK_EQ(do_flush(&d.q), 0);
    mem_host_reset_counts(&d.host);
    CHECK_EQ(do_flush(&d.q), 0);
    CHECK(d.host.ops[FLUSH] <= 1);
    CHECK_EQ(mem_host_ops(&d.host), d.host.ops[FLUSH]);
    disk_end(&d);
}

/* API-54: metadata is committed at the timer's time without a flush. */
static void timer(enum mode mode)
{
    struct disk d;
    struct fvd_info before = { .struct_size = sizeof(before) }, after = before;
    disk_start(&d, mode, MIB, MIB);
    CHECK_EQ(fvd_image_info(d.image, &before), 0);
    CHECK_EQ(d.q.timer_sets, 0);
    CHECK_EQ(do_fill(&d.q, 1, 4096, 0), 0);
    CHECK(d.q.timer_sets > 0);
    /* 5 s from now, by the host's clock. */
    CHECK_EQ(d.q.timer_at, d.q.now + 5000000000u);
    d.q.now = d.q.timer_at;
    fvd_queue_timer(d.q.queue);
    run(&d.q);
    CHECK_EQ(fvd_image_info(d.image, &after), 0);
    CHECK_EQ(after.stat_commits, before.stat_commits + 1);
    disk_crash_and_reopen(&d);
    check_bytes(&d.q, 1, 4096, 0);
    /* API-22: without need it does nothing. */
    mem_host_reset_counts(&d.host);
    fvd_queue_timer(d.q.queue);
    fvd_queue_run(d.q.queue);
    run(&d.q);
    CHECK_EQ(mem_host_ops(&d.host), 0);
    disk_end(&d);
}

int main(void)
{
    for (enum mode mode = 0; mode < MODES; mode++) {
        survives(mode, FVD_LIMIT_GROWS_ZEROED | FVD_LIMIT_CHEAP_ZEROING | FVD_LIMIT_CAN_FUA);
        survives(mode, FVD_LIMIT_GROWS_ZEROED | FVD_LIMIT_CHEAP_ZEROING);
        survives(mode, 0);
        for (uint32_t can_fua = 0; can_fua < 2; can_fua++) {
            uint32_t flags = FVD_LIMIT_GROWS_ZEROED | FVD_LIMIT_CHEAP_ZEROING | (can_fua ? FVD_LIMIT_CAN_FUA : 0);
            for (int zeroes = 0; zeroes < 2; zeroes++) {
                /* A present block, one of the base, one past the base. */
                fua_alone(mode, flags, 8192, zeroes);
                fua_alone(mode, flags, 64 * KIB, zeroes);
                fua_alone(mode, flags, MIB + 8192, zeroes);
            }
        }
        idle_flush(mode);
        timer(mode);
    }
    return 0;
}
