/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* API-35: operations that fail. */
#include "util.h"

/* A failed operation fails its request, with its errno; then all goes on. */
static void each(enum mode mode, enum op_kind kind, uint32_t file, int err)
{
    struct disk d;
    int64_t ret;
    disk_start(&d, mode, 2 * MIB, MIB);
    CHECK_EQ(do_fill(&d.q, 1, 4096, 8192), 0);
    CHECK_EQ(do_flush(&d.q), 0);
    d.host.fail_kind = kind;
    d.host.fail_file = file;
    d.host.fail_errno = err;
    if (kind == READ) {
        uint8_t buf[4096];
        ret = do_read(&d.q, buf, sizeof(buf), file == FVD_FILE_BASE ? 64 * KIB - 4096 : 8192);
    } else if (kind == WRITE) {
        ret = do_fill(&d.q, 2, 4096, 16384);
    } else {
        ret = do_write_zeroes(&d.q, 0, 64 * KIB, 0);
    }
    CHECK_EQ(ret, -err);
    d.host.fail_errno = 0;
    /* What was there is there, and the same requests work. */
    check_bytes(&d.q, 1, 4096, 8192);
    check_base(&d.q, 4096, 64 * KIB - 4096);
    CHECK_EQ(do_fill(&d.q, 2, 4096, 16384), 0);
    check_bytes(&d.q, 2, 4096, 16384);
    CHECK_EQ(do_write_zeroes(&d.q, 0, 64 * KIB, 0), 0);
    check_bytes(&d.q, 0, 64 * KIB, 0);
    CHECK_EQ(do_flush(&d.q), 0);
    CHECK_EQ(do_close(&d.q), 0);
    disk_reopen(&d, 0);
    check_bytes(&d.q, 0, 64 * KIB, 0);
    check_base(&d.q, MIB - 64 * KIB, 64 * KIB);
    disk_end(&d);
}

/* The Nth operation of a kind fails, for N = 0, 1, ... until nothing fails any more. */
static void one_after_the_other(enum mode mode, enum op_kind kind)
{
    for (unsigned n = 0;; n++) {
        struct disk d;
        struct fvd_check check;
        int64_t ret[5];
        CHECK(n < 200);
        disk_start(&d, mode, 2 * MIB, MIB);
        d.host.fail_kind = kind;
        d.host.fail_errno = ENXIO;
        d.host.fail_after = n;
        ret[0] = do_fill(&d.q, 1, 10000, 1234);
        ret[1] = do_fill(&d.q, 2, 4096, 128 * KIB);
        ret[2] = do_flush(&d.q);
        ret[3] = do_fill(&d.q, 3, 512, MIB + 512);
        ret[4] = do_close(&d.q);
        bool failed = d.host.fail_after == 0;
        d.host.fail_errno = 0;
        bool any = false;
        for (int i = 0; i < 5; i++) {
            /* -EIO after the first failure: it poisoned the image, which is another test. */
            CHECK(ret[i] == 0 || ret[i] == -ENXIO || (any && kind != READ && ret[i] == -EIO));
            any |= ret[i] != 0;
        }
        disk_reopen(&d, 0);
        CHECK_EQ(do_check(&d.q, &check), 0);
        CHECK_EQ(check.corruptions, 0);
        if (ret[0] == 0 && ret[2] == 0) {
            check_bytes(&d.q, 1, 10000, 1234);
        }
        if (ret[1] == 0 && ret[2] == 0) {
            check_bytes(&d.q, 2, 4096, 128 * KIB);
        }
        check_base(&d.q, 64 * KIB, 200 * KIB);
        CHECK_EQ(do_close(&d.q), 0);
        disk_end(&d);
        if (!failed) {
            CHECK(!any);
            CHECK(n > 0);
            break;
        }
    }
}

/* Making and opening an image over a host that fails. */
static void create_and_open(enum mode mode)
{
    static const enum op_kind kinds[] = { READ, WRITE, FLUSH, TRUNCATE, GET_LENGTH };
    for (size_t k = 0; k < sizeof(kinds) / sizeof(kinds[0]); k++) {
        for (unsigned n = 0; n < 100; n++) {
            struct mem_host host;
            struct mem_queue q;
            mem_host_init(&host, mode);
            mem_host_base(&host, MIB);
            host.fail_kind = kinds[k];
            host.fail_errno = EDOM;
            host.fail_after = n;
            struct fvd_image *image = image_new(&host, 0);
            queue_init(&q, &host, image);
            int64_t ret = do_create(&q, MIB, "b");
            if (ret == 0) {
                ret = do_open(&q);
            }
            bool failed = host.fail_after == 0;
            CHECK(ret == 0 || ret == -EDOM);
            CHECK(failed || ret == 0);
            host.fail_errno = 0;
            if (ret == 0) {
                CHECK_EQ(do_close(&q), 0);
            }
            queue_free(&q);
            fvd_image_free(&image);
            mem_host_free(&host);
            if (!failed) {
                break;
            }
        }
    }
}

/* A host that completes with nonsense must not look like a success. */
static void odd_results(void)
{
    struct disk d;
    struct result r = { 0 };
    char buf[4096];
    struct iovec iov = { .iov_base = buf, .iov_len = sizeof(buf) };
    static const int64_t odd[] = { INT64_MIN, -((int64_t)1 << 40), -100000 };
    disk_start(&d, QUEUED, MIB, 0);
    CHECK_EQ(do_fill(&d.q, 1, 4096, 0), 0);
    for (size_t i = 0; i < sizeof(odd) / sizeof(odd[0]); i++) {
        r = (struct result){ 0 };
        fvd_submit_read(d.q.queue, 0, &iov, 1, 0, done, &r);
        struct op *op = d.q.first;
        CHECK(op && !op->next);
        d.q.first = NULL;
        d.q.last = &d.q.first;
        fvd_complete(d.q.queue, op->token, odd[i]);
        free(op);
        CHECK_EQ(r.calls, 1);
        CHECK(r.ret < 0);
    }
    disk_end(&d);
}

int main(void)
{
    for (enum mode mode = 0; mode < MODES; mode++) {
        each(mode, READ, FVD_FILE_IMAGE, EIO);
        each(mode, READ, FVD_FILE_BASE, ENXIO);
        each(mode, WRITE, FVD_FILE_IMAGE, ENOSPC);
        each(mode, WRITE, FVD_FILE_IMAGE, EDQUOT);
        each(mode, WRITE_ZEROES, FVD_FILE_IMAGE, EIO);
        one_after_the_other(mode, READ);
        one_after_the_other(mode, WRITE);
        one_after_the_other(mode, FLUSH);
        create_and_open(mode);
    }
    odd_results();
    return 0;
}
