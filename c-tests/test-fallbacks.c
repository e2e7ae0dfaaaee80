/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Hosts that lack optional callbacks: API-49 to API-54. */
#include "util.h"

static void disk_start_with(struct disk *d, enum mode mode, void (*strip)(struct fvd_host_ops *))
{
    memset(d, 0, sizeof(*d));
    mem_host_init(&d->host, mode);
    strip(&d->host.callbacks);
    if (!d->host.callbacks.truncate) {
        mem_host_device(&d->host, 16 * MIB);
    }
    mem_host_base(&d->host, MIB);
    d->image = image_new(&d->host, 0);
    queue_init(&d->q, &d->host, d->image);
    CHECK_EQ(do_create(&d->q, 8 * MIB, "b"), 0);
    CHECK_EQ(do_open(&d->q), 0);
    mem_host_reset_counts(&d->host);
}

static void without_write_zeroes(struct fvd_host_ops *ops)
{
    ops->write_zeroes = NULL;
}

static char *deepest;
static unsigned biggest;
static struct fvd_host_ops real_ops;

static void measured_write(void *o, uint64_t t, uint32_t f, uint64_t at, const struct iovec *iov, int n, uint64_t len,
                           uint32_t flags)
{
    char here;
    if (!deepest || &here < deepest) {
        deepest = &here;
    }
    if (len > biggest) {
        biggest = (unsigned)len;
    }
    real_ops.write(o, t, f, at, iov, n, len, flags);
}

static void with_measured_write(struct fvd_host_ops *ops)
{
    real_ops = *ops;
    ops->write_zeroes = NULL;
    ops->write = measured_write;
}

/* API-49 */
static void zeroes(enum mode mode)
{
    struct disk d;
    disk_start_with(&d, mode, without_write_zeroes);
    CHECK_EQ(do_fill(&d.q, 1, 6 * MIB, MIB), 0);
    CHECK_EQ(do_write_zeroes(&d.q, 2 * MIB + 512, 4 * MIB - 1024, FVD_REQ_MAY_UNMAP), 0);
    CHECK_EQ(d.host.ops[WRITE_ZEROES], 0);
    check_bytes(&d.q, 1, MIB + 512, MIB);
    check_bytes(&d.q, 0, 4 * MIB - 1024, 2 * MIB + 512);
    check_bytes(&d.q, 1, MIB + 512, 6 * MIB - 512);
    /* A piece that fails fails the request. */
    d.host.fail_kind = WRITE;
    d.host.fail_errno = ENOSPC;
    d.host.fail_after = 1;
    CHECK_EQ(do_write_zeroes(&d.q, 2 * MIB, 4 * MIB, 0), -ENOSPC);
    d.host.fail_errno = 0;
    CHECK_EQ(fvd_queue_is_idle(d.q.queue), 1);
    CHECK_EQ(do_write_zeroes(&d.q, 2 * MIB, 4 * MIB, 0), 0);
    disk_end(&d);

    /* However long the range, the stack does not grow. */
    char here;
    disk_start_with(&d, mode, with_measured_write);
    CHECK_EQ(do_write_zeroes(&d.q, 2 * MIB, 1 * MIB, 0), 0);
    size_t few = (size_t)(&here - deepest);
    deepest = NULL;
    CHECK_EQ(do_resize(&d.q, 256 * MIB, 0), 0);
    CHECK_EQ(do_write_zeroes(&d.q, 2 * MIB, 200 * MIB, 0), 0);
    CHECK((size_t)(&here - deepest) <= few + 4096);
    CHECK(biggest <= MIB);
    disk_end(&d);
}

static void without_discard(struct fvd_host_ops *ops)
{
    ops->discard = NULL;
}

/* API-50 */
static void discard(enum mode mode)
{
    struct disk d;
    disk_start_with(&d, mode, without_discard);
    CHECK_EQ(do_fill(&d.q, 1, MIB, 2 * MIB), 0);
    CHECK_EQ(do_discard(&d.q, 2 * MIB, MIB), 0);
    CHECK_EQ(d.host.ops[DISCARD], 0);
    disk_end(&d);
}

static void without_truncate(struct fvd_host_ops *ops)
{
    ops->truncate = NULL;
}

/* API-51 */
static void truncate_(enum mode mode)
{
    struct disk d;
    disk_start_with(&d, mode, without_truncate);
    CHECK_EQ(do_fill(&d.q, 1, MIB, 2 * MIB), 0);
    check_bytes(&d.q, 1, MIB, 2 * MIB);
    check_base(&d.q, MIB, 0);
    CHECK_EQ(do_resize(&d.q, 64 * MIB, 0), -ENOSPC);
    disk_end(&d);

    struct mem_host host;
    struct mem_queue q;
    mem_host_init(&host, mode);
    host.callbacks.truncate = NULL;
    mem_host_device(&host, MIB);
    struct fvd_image *image = image_new(&host, 0);
    queue_init(&q, &host, image);
    CHECK_EQ(do_create(&q, 8 * MIB, NULL), -ENOSPC);
    queue_free(&q);
    fvd_image_free(&image);
    mem_host_free(&host);
}

static void without_base_status(struct fvd_host_ops *ops)
{
    ops->base_status = NULL;
}

/* API-52: looking for zeroes in the base reads it instead, or finds none; the disk is the same. */
static void base_status_(enum mode mode)
{
    struct disk d;
    struct fvd_block_status status;
    disk_start_with(&d, mode, without_base_status);
    check_base(&d.q, MIB, 0);
    CHECK_EQ(do_status(&d.q, 0, MIB, &status), 0);
    CHECK_EQ(status.place, FVD_PLACE_BASE);
    CHECK_EQ(d.host.ops[BASE_STATUS], 0);
    CHECK_EQ(do_close(&d.q), 0);
    queue_free(&d.q);
    fvd_image_free(&d.image);

    struct fvd_create params = { .struct_size = sizeof(params), .virtual_size = MIB, .block_size = 4096,
                                 .detect_sparse_hole = 1, .base_name = "b", .base_format = "raw" };
    for (int has = 0; has < 2; has++) {
        struct result r = { 0 };
        struct mem_host host;
        mem_host_init(&host, mode);
        mem_host_base(&host, MIB);
        if (!has) {
            host.callbacks.base_status = NULL;
        }
        struct fvd_image *image = image_new(&host, 0);
        struct mem_queue q;
        queue_init(&q, &host, image);
        fvd_submit_create(q.queue, &params, done, &r);
        CHECK_EQ(wait_for(&q, &r), 0);
        CHECK_EQ(do_open(&q), 0);
        check_base(&q, MIB, 0);
        CHECK_EQ(do_close(&q), 0);
        queue_free(&q);
        fvd_image_free(&image);
        mem_host_free(&host);
    }
    mem_host_free(&d.host);
}

static int random_fails(void *opaque, void *buf, size_t len)
{
    (void)opaque;
    memset(buf, 0, len);
    return -EIO;
}

static void without_the_rest(struct fvd_host_ops *ops)
{
    ops->now_ns = NULL;
    ops->random_bytes = NULL;
    ops->set_timer = NULL;
    ops->log = NULL;
}

static void with_bad_random(struct fvd_host_ops *ops)
{
    ops->random_bytes = random_fails;
}

/* API-53, API-54 */
static void the_rest(enum mode mode)
{
    struct disk d;
    struct fvd_info a = { .struct_size = sizeof(a) }, b = a;
    disk_start_with(&d, mode, without_the_rest);
    CHECK_EQ(fvd_image_info(d.image, &a), 0);
    CHECK_EQ(do_fill(&d.q, 1, 8192, 0), 0);
    CHECK_EQ(do_flush(&d.q), 0);
    disk_crash_and_reopen(&d);
    check_bytes(&d.q, 1, 8192, 0);
    disk_end(&d);
    disk_start_with(&d, mode, with_bad_random);
    CHECK_EQ(fvd_image_info(d.image, &b), 0);
    disk_end(&d);
    CHECK(memcmp(a.uuid, b.uuid, 16) != 0);
    CHECK(memcmp(b.uuid, "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 16) != 0);
}

int main(void)
{
    for (enum mode mode = 0; mode < MODES; mode++) {
        zeroes(mode);
        discard(mode);
        truncate_(mode);
        base_status_(mode);
        the_rest(mode);
    }
    return 0;
}
