/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What is valid until when. Memory is given back at the first moment that the contract allows:
 * valgrind and ASan see who uses it longer.
 */
#include "util.h"

/* A request whose memory, and itself, are gone when done returns. */
struct loose {
    uint8_t *buf;
    struct iovec *iov;
    unsigned *left;
};

static void loose_done(void *opaque, int64_t ret, const char *error)
{
    struct loose *l = opaque;
    CHECK_EQ(ret, 0);
    CHECK(!error);
    memset(l->buf, 0xdd, 5000);
    free(l->buf);
    free(l->iov);
    --*l->left;
    free(l);
}

/* API-6: memory and array are the library's from submit until done. */
static void guest_memory(enum mode mode)
{
    struct disk d;
    unsigned left = 64;
    disk_start(&d, mode, 2 * MIB, MIB);
    for (unsigned i = 0; i < 64; i++) {
        struct loose *l = malloc(sizeof(*l));
        CHECK(l);
        *l = (struct loose){ .buf = malloc(5000), .iov = malloc(2 * sizeof(struct iovec)), .left = &left };
        CHECK(l->buf && l->iov);
        memset(l->buf, (int)i + 1, 5000);
        l->iov[0] = (struct iovec){ .iov_base = l->buf, .iov_len = 1000 };
        l->iov[1] = (struct iovec){ .iov_base = l->buf + 1000, .iov_len = 4000 };
        if (i % 3 == 2) {
            fvd_submit_read(d.q.queue, (uint64_t)i * 20000, l->iov, 2, 0, loose_done, l);
        } else {
            fvd_submit_write(d.q.queue, (uint64_t)i * 20000, l->iov, 2, i % 4 ? 0 : FVD_REQ_FUA, loose_done, l);
        }
    }
    run(&d.q);
    CHECK_EQ(left, 0);
    for (unsigned i = 0; i < 64; i++) {
        if (i % 3 != 2) {
            check_bytes(&d.q, (uint8_t)(i + 1), 5000, (uint64_t)i * 20000);
        }
    }
    disk_end(&d);
}

/* API-7: parameters and names are copied. */
static void parameters(enum mode mode)
{
    struct mem_host host;
    struct mem_queue q;
    struct result r = { 0 };
    struct fvd_info info = { .struct_size = sizeof(info) };
    mem_host_init(&host, mode);
    struct fvd_image *image = image_new(&host, 0);
    queue_init(&q, &host, image);
    struct fvd_create *params = calloc(1, sizeof(*params));
    char *name = strdup("some/base.img"), *format = strdup("qcow2");
    CHECK(params && name && format);
    params->struct_size = sizeof(*params);
    params->virtual_size = MIB;
    params->base_name = name;
    params->base_format = format;
    fvd_submit_create(q.queue, params, done, &r);
    memset(name, 'x', strlen(name));
    memset(params, 0xff, sizeof(*params));
    free(name);
    free(format);
    free(params);
    CHECK_EQ(wait_for(&q, &r), 0);
    CHECK_EQ(do_open(&q), 0);
    CHECK_EQ(fvd_image_info(image, &info), 0);
    CHECK(!strcmp(info.base_name, "some/base.img"));
    CHECK(!strcmp(info.base_format, "qcow2"));

    r = (struct result){ 0 };
    name = strdup("other.img");
    format = strdup("raw");
    CHECK(name && format);
    fvd_submit_change_base(q.queue, name, format, done, &r);
    free(name);
    free(format);
    CHECK_EQ(wait_for(&q, &r), 0);
    CHECK_EQ(fvd_image_info(image, &info), 0);
    CHECK(!strcmp(info.base_name, "other.img"));
    CHECK_EQ(do_close(&q), 0);
    queue_free(&q);
    fvd_image_free(&image);
    mem_host_free(&host);
}

/* API-8: what an operation names stays in place until it is completed, also when others come and go. */
static void operations(void)
{
    struct disk d;
    struct result r[32] = { { 0 } };
    static uint8_t buf[32][6000];
    struct iovec iov[32];
    struct {
        const struct iovec *iov;
        struct iovec first;
        uint64_t token;
    } seen[64];
    unsigned count = 0;
    disk_start(&d, QUEUED, 2 * MIB, MIB);
    for (int i = 0; i < 32; i++) {
        memset(buf[i], i, sizeof(buf[i]));
        iov[i] = (struct iovec){ .iov_base = buf[i], .iov_len = sizeof(buf[i]) };
        fvd_submit_write(d.q.queue, (uint64_t)i * 30000 + 11, &iov[i], 1, 0, done, &r[i]);
    }
    for (struct op *op = d.q.first; op && count < 64; op = op->next) {
        if (op->iovcnt > 0) {
            seen[count].iov = op->iov;
            seen[count].first = op->iov[0];
            seen[count++].token = op->token;
        }
    }
    CHECK(count >= 32);
    /* Others in between. */
    for (int i = 0; i < 16; i++) {
        run_one(&d.q);
    }
    for (struct op *op = d.q.first; op; op = op->next) {
        for (unsigned i = 0; i < count; i++) {
            if (seen[i].token == op->token) {
                CHECK(op->iov == seen[i].iov);
                CHECK(op->iov[0].iov_base == seen[i].first.iov_base);
                CHECK_EQ(op->iov[0].iov_len, seen[i].first.iov_len);
            }
        }
    }
    run(&d.q);
    for (int i = 0; i < 32; i++) {
        CHECK_EQ(r[i].calls, 1);
        CHECK_EQ(r[i].ret, 0);
    }
    disk_end(&d);
}

struct answer {
    struct fvd_block_status *out;
    bool done;
    int64_t ret;
};

static void answer_done(void *opaque, int64_t ret, const char *error)
{
    struct answer *a = opaque;
    /* API-10: it is there now. */
    CHECK_EQ(a->out->len, ret == 0 ? 64 * KIB : 0);
    free(a->out);
    a->done = true;
    a->ret = ret;
    /* API-9 */
    CHECK((ret < 0) == (error != NULL));
}

/* API-10: answers are written before done, not after, and not on failure. */
static void answers(enum mode mode)
{
    struct disk d;
    disk_start(&d, mode, 2 * MIB, MIB);
    CHECK_EQ(do_fill(&d.q, 1, 64 * KIB, 0), 0);
    for (int fails = 0; fails < 2; fails++) {
        struct answer a = { .out = calloc(1, sizeof(*a.out)) };
        CHECK(a.out);
        a.out->struct_size = sizeof(*a.out);
        fvd_submit_block_status(d.q.queue, fails ? 2 * MIB : 0, 64 * KIB, a.out, answer_done, &a);
        run(&d.q);
        CHECK(a.done);
        CHECK_EQ(a.ret, fails ? -EINVAL : 0);
    }
    disk_end(&d);
}

static struct fvd_host_ops real_ops;
static pthread_t queue_thread;
static _Thread_local bool in_library;
static unsigned calls_seen;

static void watch(void)
{
    /* API-13: on the queue's thread, from within a call on that queue. */
    CHECK(pthread_equal(pthread_self(), queue_thread));
    CHECK(in_library);
    calls_seen++;
}

static void watch_read(void *o, uint64_t t, uint32_t f, uint64_t at, const struct iovec *iov, int n, uint64_t len)
{
    watch();
    real_ops.read(o, t, f, at, iov, n, len);
}

static void watch_write(void *o, uint64_t t, uint32_t f, uint64_t at, const struct iovec *iov, int n, uint64_t len,
                        uint32_t flags)
{
    watch();
    real_ops.write(o, t, f, at, iov, n, len, flags);
}

static void watch_flush(void *o, uint64_t t, uint32_t f)
{
    watch();
    real_ops.flush(o, t, f);
}

static uint64_t watch_now(void *o)
{
    watch();
    return real_ops.now_ns(o);
}

static void watch_timer(void *o, uint64_t at)
{
    watch();
    real_ops.set_timer(o, at);
}

/* API-13 */
static void threads_of_callbacks(void)
{
    struct mem_host host;
    struct mem_queue q;
    mem_host_init(&host, QUEUED);
    mem_host_base(&host, MIB);
    real_ops = host.callbacks;
    host.callbacks.read = watch_read;
    host.callbacks.write = watch_write;
    host.callbacks.flush = watch_flush;
    host.callbacks.now_ns = watch_now;
    host.callbacks.set_timer = watch_timer;
    queue_thread = pthread_self();
    in_library = true;
    struct fvd_image *image = image_new(&host, 0);
    queue_init(&q, &host, image);
    CHECK_EQ(do_create(&q, MIB, "b"), 0);
    CHECK_EQ(do_open(&q), 0);
    CHECK_EQ(do_fill(&q, 1, 100, 100), 0);
    CHECK_EQ(do_flush(&q), 0);
    /* Nothing happens on its own. */
    in_library = false;
    struct timespec nap = { .tv_nsec = 20000000 };
    nanosleep(&nap, NULL);
    in_library = true;
    CHECK_EQ(do_close(&q), 0);
    queue_free(&q);
    CHECK(calls_seen > 10);
    fvd_image_free(&image);
    mem_host_free(&host);
}

int main(void)
{
    for (enum mode mode = 0; mode < MODES; mode++) {
        guest_memory(mode);
        parameters(mode);
        answers(mode);
    }
    operations();
    threads_of_callbacks();
    return 0;
}
