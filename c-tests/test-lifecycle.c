/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Handles: who owns what, and which call is allowed when. */
#include "util.h"

/* API-1: the structs are copied. */
static void structs_are_copied(void)
{
    struct mem_host host;
    struct mem_queue q;
    struct fvd_image *image;
    mem_host_init(&host, QUEUED);
    struct fvd_host_ops *ops = malloc(sizeof(*ops));
    struct fvd_config *config = calloc(1, sizeof(*config));
    CHECK(ops && config);
    *ops = host.callbacks;
    config->struct_size = sizeof(*config);
    config->limits[0] = host.limits;
    CHECK_EQ(fvd_image_new(ops, config, &image), 0);
    memset(ops, 0xff, sizeof(*ops));
    memset(config, 0xff, sizeof(*config));
    free(ops);
    free(config);
    queue_init(&q, &host, image);
    CHECK_EQ(do_create(&q, MIB, NULL), 0);
    CHECK_EQ(do_open(&q), 0);
    CHECK_EQ(do_close(&q), 0);
    queue_free(&q);
    fvd_image_free(&image);
    mem_host_free(&host);
}

static void handles(enum mode mode)
{
    struct disk d;
    struct result r = { 0 };
    char buf[4096];
    struct iovec iov = { .iov_base = buf, .iov_len = sizeof(buf) };
    disk_start(&d, mode, MIB, MIB);

    /* API-4: an image with queues is not freed. */
    fvd_image_free(&d.image);
    CHECK(d.image);
    CHECK(strstr(fvd_error(), "queue"));

    /* API-5: a queue with work under way is not freed. */
    if (mode != INLINE) {
        fvd_submit_read(d.q.queue, 0, &iov, 1, 0, done, &r);
        CHECK_EQ(r.calls, 0);
        CHECK_EQ(fvd_queue_is_idle(d.q.queue), 0);
        CHECK_EQ(fvd_queue_free(&d.q.queue), -EBUSY);
        CHECK(d.q.queue);
        CHECK_EQ(wait_for(&d.q, &r), 0);
        CHECK_EQ(fvd_queue_is_idle(d.q.queue), 1);
    }

    /* API-3: freeing clears the variable; NULL is fine. */
    CHECK_EQ(do_close(&d.q), 0);
    CHECK_EQ(fvd_queue_free(&d.q.queue), 0);
    CHECK(!d.q.queue);
    CHECK_EQ(fvd_queue_free(&d.q.queue), 0);
    CHECK_EQ(fvd_queue_free(NULL), 0);
    fvd_image_free(&d.image);
    CHECK(!d.image);
    fvd_image_free(&d.image);
    fvd_image_free(NULL);
    struct fvd_file *file = NULL;
    CHECK_EQ(fvd_file_close(&file), 0);
    CHECK_EQ(fvd_file_close(NULL), 0);
    mem_host_free(&d.host);
}

static struct mem_queue *freed_in_done;

static void free_in_done(struct result *r)
{
    (void)r;
    struct fvd_queue *queue = freed_in_done->queue;
    CHECK_EQ(fvd_queue_free(&queue), -EBUSY);
    CHECK(queue);
}

/* API-5: not from within a callback either. */
static void freeing_in_a_callback(enum mode mode)
{
    struct disk d;
    struct result r = { .then = free_in_done };
    disk_start(&d, mode, MIB, 0);
    freed_in_done = &d.q;
    fvd_submit_flush(d.q.queue, done, &r);
    CHECK_EQ(wait_for(&d.q, &r), 0);
    disk_end(&d);
}

/* API-24: the table of states. */
static void states(enum mode mode)
{
    struct mem_host host;
    struct mem_queue q;
    struct fvd_info info = { .struct_size = sizeof(info) };
    struct fvd_mapping map;
    struct fvd_block_status status;
    struct fvd_check check;
    char buf[512];
    mem_host_init(&host, mode);
    struct fvd_image *image = image_new(&host, 0);
    queue_init(&q, &host, image);

    for (int closed = 0; closed < 2; closed++) {
        CHECK_EQ(do_close(&q), -EBUSY);
        CHECK_EQ(do_read(&q, buf, sizeof(buf), 0), -EBUSY);
        CHECK_EQ(do_write(&q, buf, sizeof(buf), 0, 0), -EBUSY);
        CHECK_EQ(do_flush(&q), -EBUSY);
        CHECK_EQ(do_write_zeroes(&q, 0, 512, 0), -EBUSY);
        CHECK_EQ(do_discard(&q, 0, 512), -EBUSY);
        CHECK_EQ(do_resize(&q, 8 * MIB, 0), -EBUSY);
        CHECK_EQ(do_status(&q, 0, 512, &status), -EBUSY);
        CHECK_EQ(do_change_base(&q, "x", "raw"), -EBUSY);
        CHECK_EQ(do_make_empty(&q), -EBUSY);
        CHECK_EQ(do_check(&q, &check), -EBUSY);
        CHECK_EQ(fvd_lookup(image, 0, 0, 512, 0, &map), FVD_LOOKUP_ASK);
        fvd_queue_run(q.queue);
        fvd_queue_timer(q.queue);
        if (closed) {
            CHECK_EQ(do_create(&q, MIB, NULL), -EBUSY);
            CHECK_EQ(do_open(&q), -EBUSY);
            CHECK_EQ(fvd_image_info(image, &info), 0);
            break;
        }
        CHECK_EQ(fvd_image_info(image, &info), -EBUSY);
        CHECK_EQ(do_create(&q, MIB, NULL), 0);
        CHECK_EQ(do_create(&q, MIB, NULL), 0);
        CHECK_EQ(do_open(&q), 0);
        CHECK_EQ(do_open(&q), -EBUSY);
        CHECK_EQ(do_create(&q, MIB, NULL), -EBUSY);
        CHECK_EQ(fvd_image_info(image, &info), 0);
        CHECK_EQ(do_close(&q), 0);
    }
    queue_free(&q);
    fvd_image_free(&image);
    mem_host_free(&host);
}

/* API-25, API-26: close waits, then the image is clean. */
static void close_waits(enum mode mode)
{
    struct disk d;
    struct result writes[6] = { { 0 } }, closing = { 0 }, late = { 0 };
    char buf[6][4096];
    struct iovec iov[6];
    struct fvd_info info = { .struct_size = sizeof(info) };
    disk_start(&d, mode, 2 * MIB, MIB);
    CHECK_EQ(do_fill(&d.q, 99, 4096, MIB + 64 * KIB), 0);
    for (int i = 0; i < 6; i++) {
        memset(buf[i], i + 1, sizeof(buf[i]));
        iov[i] = (struct iovec){ .iov_base = buf[i], .iov_len = sizeof(buf[i]) };
        /* Two of them pass through. */
        uint64_t offset = (uint64_t)i * 4096 + (i < 4 ? 0 : MIB + 64 * KIB);
        fvd_submit_write(d.q.queue, offset, &iov[i], 1, 0, done, &writes[i]);
    }
    fvd_submit_close(d.q.queue, done, &closing);
    fvd_submit_write(d.q.queue, 0, iov, 1, 0, done, &late);
    run(&d.q);
    CHECK_EQ(closing.calls, 1);
    CHECK_EQ(closing.ret, 0);
    CHECK_EQ(late.ret, -EBUSY);
    for (int i = 0; i < 6; i++) {
        CHECK_EQ(writes[i].calls, 1);
        CHECK_EQ(writes[i].ret, 0);
        CHECK(writes[i].order < closing.order);
    }
    /* Everything is durable, and the mark too. */
    disk_crash_and_reopen(&d);
    CHECK_EQ(fvd_image_info(d.image, &info), 0);
    CHECK(info.flags & FVD_INFO_CLEAN);
    CHECK_EQ(info.commits_replayed, 0);
    for (int i = 0; i < 6; i++) {
        check_bytes(&d.q, (uint8_t)(i + 1), 4096, (uint64_t)i * 4096 + (i < 4 ? 0 : MIB + 64 * KIB));
    }
    disk_end(&d);
}

/* An image that is not closed is not clean, and recovers. */
static void without_close(enum mode mode)
{
    struct disk d;
    struct fvd_info info = { .struct_size = sizeof(info) };
    disk_start(&d, mode, MIB, MIB);
    CHECK_EQ(do_fill(&d.q, 7, 4096, 0), 0);
    CHECK_EQ(do_flush(&d.q), 0);
    disk_crash_and_reopen(&d);
    CHECK_EQ(fvd_image_info(d.image, &info), 0);
    CHECK(!(info.flags & FVD_INFO_CLEAN));
    CHECK(info.commits_replayed > 0);
    check_bytes(&d.q, 7, 4096, 0);
    disk_end(&d);
}

int main(void)
{
    structs_are_copied();
    for (enum mode mode = 0; mode < MODES; mode++) {
        handles(mode);
        freeing_in_a_callback(mode);
        states(mode);
        close_waits(mode);
        without_close(mode);
    }
    return 0;
}
