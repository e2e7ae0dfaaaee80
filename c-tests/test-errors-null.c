/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* NULL, and pointers to the wrong thing. */
#include "util.h"

static int64_t last;
static unsigned calls;

static void remember(void *opaque, int64_t ret, const char *error)
{
    CHECK(opaque == &last);
    CHECK(error && strlen(error) > 0);
    last = ret;
    calls++;
}

/* API-29, API-20: every submit function with this queue fails with -EINVAL, once. */
static void all_submits(struct fvd_queue *queue)
{
    struct fvd_create params = { .struct_size = sizeof(params), .virtual_size = MIB };
    struct fvd_amend amend = { .struct_size = sizeof(amend) };
    struct fvd_block_status status = { .struct_size = sizeof(status) };
    struct fvd_check check = { .struct_size = sizeof(check) };
    char buf[512];
    struct iovec iov = { .iov_base = buf, .iov_len = sizeof(buf) };
    calls = 0;
    fvd_submit_create(queue, &params, remember, &last);
    CHECK(calls == 1 && last == -EINVAL);
    fvd_submit_open(queue, remember, &last);
    CHECK(calls == 2 && last == -EINVAL);
    fvd_submit_close(queue, remember, &last);
    CHECK(calls == 3 && last == -EINVAL);
    fvd_submit_read(queue, 0, &iov, 1, 0, remember, &last);
    CHECK(calls == 4 && last == -EINVAL);
    fvd_submit_write(queue, 0, &iov, 1, 0, remember, &last);
    CHECK(calls == 5 && last == -EINVAL);
    fvd_submit_flush(queue, remember, &last);
    CHECK(calls == 6 && last == -EINVAL);
    fvd_submit_write_zeroes(queue, 0, 512, 0, remember, &last);
    CHECK(calls == 7 && last == -EINVAL);
    fvd_submit_discard(queue, 0, 512, remember, &last);
    CHECK(calls == 8 && last == -EINVAL);
    fvd_submit_resize(queue, MIB, 0, remember, &last);
    CHECK(calls == 9 && last == -EINVAL);
    fvd_submit_block_status(queue, 0, 512, &status, remember, &last);
    CHECK(calls == 10 && last == -EINVAL);
    fvd_submit_change_base(queue, "x", "raw", remember, &last);
    CHECK(calls == 11 && last == -EINVAL);
    fvd_submit_check(queue, &check, 0, NULL, remember, &last);
    CHECK(calls == 12 && last == -EINVAL);
    fvd_submit_make_empty(queue, remember, &last);
    CHECK(calls == 13 && last == -EINVAL);
    fvd_submit_amend(queue, &amend, remember, &last);
    CHECK(calls == 14 && last == -EINVAL);
}

/* API-29: so do the others, or they do nothing. */
static void all_others(struct fvd_image *image, struct fvd_queue *queue, struct fvd_file *file)
{
    struct fvd_info info = { .struct_size = sizeof(info) };
    struct fvd_mapping map = { .len = 77 };
    struct fvd_queue *q = (void *)&map;
    char buf[512];
    CHECK_EQ(fvd_image_info(image, &info), -EINVAL);
    CHECK_EQ(fvd_queue_new(image, NULL, &q), -EINVAL);
    CHECK(!q);
    CHECK_EQ(fvd_lookup(image, 0, 0, 512, 0, &map), FVD_LOOKUP_ASK);
    CHECK_EQ(map.len, 77);
    fvd_end(image, 0);
    CHECK_EQ(fvd_queue_is_idle(queue), -EINVAL);
    fvd_queue_run(queue);
    fvd_queue_timer(queue);
    fvd_complete(queue, 1, 0);
    CHECK(!fvd_file_queue(file));
    CHECK(!fvd_file_image(file));
    CHECK_EQ(fvd_file_fd(file), -EINVAL);
    CHECK_EQ(fvd_file_process(file, 0), -EINVAL);
    CHECK_EQ(fvd_file_pread(file, buf, sizeof(buf), 0), -EINVAL);
    CHECK_EQ(fvd_file_pwrite(file, buf, sizeof(buf), 0), -EINVAL);
    CHECK_EQ(fvd_file_flush(file), -EINVAL);
    CHECK(strlen(fvd_error()) > 0);
}

int main(void)
{
    struct disk d;
    struct result r = { 0 };
    struct fvd_image *image = (void *)&d;
    struct fvd_file *file = (void *)&d;
    static const uint64_t nothing[32];
    disk_start(&d, QUEUED, MIB, MIB);

    all_submits(NULL);
    all_others(NULL, NULL, NULL);
    /* Other types, no handles at all, and odd addresses. */
    all_submits((void *)d.image);
    all_others((void *)d.q.queue, (void *)d.image, (void *)d.image);
    all_submits((void *)nothing);
    all_others((void *)nothing, (void *)nothing, (void *)nothing);
    all_submits((void *)((char *)d.q.queue + 1));
    struct fvd_queue *wrong = (void *)d.image;
    CHECK_EQ(fvd_queue_free(&wrong), -EINVAL);
    CHECK(wrong);

    /* API-2: nothing is left in out. */
    CHECK_EQ(fvd_image_new(NULL, NULL, &image), -EINVAL);
    CHECK(!image);
    CHECK_EQ(fvd_image_new(NULL, NULL, NULL), -EINVAL);
    CHECK_EQ(fvd_queue_new(d.image, NULL, NULL), -EINVAL);
    CHECK_EQ(fvd_file_open(NULL, NULL, &file), -EINVAL);
    CHECK(!file);
    CHECK_EQ(fvd_file_open("/nonexistent/x", NULL, &file), -ENOENT);
    CHECK(!file);
    CHECK_EQ(fvd_file_open("x", NULL, NULL), -EINVAL);
    CHECK_EQ(fvd_file_create(NULL, NULL, NULL), -EINVAL);
    CHECK_EQ(fvd_image_info(d.image, NULL), -EINVAL);
    CHECK_EQ(fvd_lookup(d.image, 0, 0, 512, 0, NULL), FVD_LOOKUP_ASK);

    /* API-31: memory that is not there. */
    struct iovec null = { .iov_base = NULL, .iov_len = 1 }, empty = { 0 };
    fvd_submit_read(d.q.queue, 0, NULL, 1, 0, done, &r);
    CHECK_EQ(wait_for(&d.q, &r), -EINVAL);
    r = (struct result){ 0 };
    fvd_submit_write(d.q.queue, 0, &null, 1, 0, done, &r);
    CHECK_EQ(wait_for(&d.q, &r), -EINVAL);
    r = (struct result){ 0 };
    fvd_submit_read(d.q.queue, 0, &empty, -1, 0, done, &r);
    CHECK_EQ(wait_for(&d.q, &r), -EINVAL);
    /* Nothing to do is fine. */
    r = (struct result){ 0 };
    fvd_submit_read(d.q.queue, 0, NULL, 0, 0, done, &r);
    CHECK_EQ(wait_for(&d.q, &r), 0);
    r = (struct result){ 0 };
    fvd_submit_write(d.q.queue, 512, &empty, 1, 0, done, &r);
    CHECK_EQ(wait_for(&d.q, &r), 0);

    r = (struct result){ 0 };
    fvd_submit_create(d.q.queue, NULL, done, &r);
    CHECK_EQ(wait_for(&d.q, &r), -EINVAL);
    r = (struct result){ 0 };
    fvd_submit_block_status(d.q.queue, 0, 512, NULL, done, &r);
    CHECK_EQ(wait_for(&d.q, &r), -EINVAL);
    r = (struct result){ 0 };
    fvd_submit_check(d.q.queue, NULL, 0, NULL, done, &r);
    CHECK_EQ(wait_for(&d.q, &r), -EINVAL);

    /* API-34: names. */
    CHECK_EQ(do_change_base(&d.q, "\xff\xfe", "raw"), -EINVAL);
    CHECK_EQ(do_change_base(&d.q, "x", "\xff"), -EINVAL);
    CHECK_EQ(do_change_base(&d.q, NULL, NULL), 0);

    /* API-21: nobody to tell. */
    mem_host_reset_counts(&d.host);
    fvd_submit_flush(d.q.queue, NULL, NULL);
    CHECK(strstr(fvd_error(), "done"));
    fvd_submit_write(d.q.queue, 0, &empty, 1, 0, NULL, NULL);
    fvd_submit_close(NULL, NULL, NULL);
    CHECK_EQ(mem_host_ops(&d.host), 0);
    CHECK_EQ(fvd_queue_is_idle(d.q.queue), 1);

    /* The disk is still there. */
    CHECK_EQ(do_fill(&d.q, 1, 4096, 0), 0);
    check_bytes(&d.q, 1, 4096, 0);
    disk_end(&d);
    return 0;
}
