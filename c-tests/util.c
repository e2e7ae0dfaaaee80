/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "util.h"

#include <unistd.h>

const char *const mode_names[MODES] = { "inline", "queued", "reversed" };

/* Files in memory. */

static void file_resize(struct mem_file *f, uint64_t len)
{
    uint8_t *data = realloc(f->data, len ? len : 1);
    CHECK(data);
    if (len > f->len) {
        memset(data + f->len, 0, len - f->len);
    }
    f->data = data;
    f->len = len;
}

static void file_settle(struct mem_file *f)
{
    free(f->durable);
    f->durable = malloc(f->len ? f->len : 1);
    CHECK(f->durable);
    memcpy(f->durable, f->data, f->len);
    f->durable_len = f->len;
}

/* A FUA write: only its own bytes are durable, and the length as far as they need it. */
static void file_settle_range(struct mem_file *f, uint64_t offset, uint64_t len)
{
    if (f->durable_len < offset + len) {
        uint8_t *durable = realloc(f->durable, offset + len);
        CHECK(durable);
        memset(durable + f->durable_len, 0, offset + len - f->durable_len);
        f->durable = durable;
        f->durable_len = offset + len;
    }
    memcpy(f->durable + offset, f->data + offset, len);
}

uint8_t base_byte(uint64_t at)
{
    /* 64 KiB of pattern, then 64 KiB of zeroes, and so on. */
    return at / (64 * KIB) % 2 ? 0 : (uint8_t)(at / 512 * 7 + at + 1);
}

void mem_host_base(struct mem_host *host, uint64_t len)
{
    struct mem_file *f = &host->files[FVD_FILE_BASE];
    f->there = true;
    file_resize(f, len);
    for (uint64_t i = 0; i < len; i++) {
        f->data[i] = base_byte(i);
    }
}

void mem_host_device(struct mem_host *host, uint64_t len)
{
    struct mem_file *f = &host->files[FVD_FILE_IMAGE];
    file_resize(f, len);
    memset(f->data, 0xd7, len);
    file_settle(f);
    host->limits.flags &= ~(uint32_t)FVD_LIMIT_GROWS_ZEROED;
}

void mem_host_crash(struct mem_host *host)
{
    struct mem_file *f = &host->files[FVD_FILE_IMAGE];
    file_resize(f, f->durable_len);
    if (f->durable_len) {
        memcpy(f->data, f->durable, f->durable_len);
    }
}

void mem_host_reset_counts(struct mem_host *host)
{
    memset(host->ops, 0, sizeof(host->ops));
    host->fua_writes = 0;
    host->bytes_written = 0;
}

unsigned mem_host_ops(const struct mem_host *host)
{
    unsigned sum = 0;
    for (int i = 0; i < OP_KINDS; i++) {
        sum += host->ops[i];
    }
    return sum;
}

/* What the library promises about every operation (API-46, API-47, API-48). */
static void check_op(const struct mem_host *host, const struct op *op)
{
    uint64_t align = host->limits.request_alignment, sum = 0;
    CHECK(op->token != 0);
    CHECK(op->file <= FVD_FILE_BASE);
    if (op->file == FVD_FILE_BASE) {
        CHECK(op->kind == READ || op->kind == GET_LENGTH || op->kind == BASE_STATUS);
    }
    if (op->kind == READ || op->kind == WRITE) {
        for (int i = 0; i < op->iovcnt; i++) {
            CHECK(op->iov[i].iov_base && op->iov[i].iov_len > 0);
            sum += op->iov[i].iov_len;
            if (op->file == FVD_FILE_IMAGE && host->limits.memory_alignment > 1) {
                CHECK_EQ((uintptr_t)op->iov[i].iov_base % host->limits.memory_alignment, 0);
            }
        }
        CHECK_EQ(sum, op->len);
    }
    if (op->file == FVD_FILE_IMAGE && align > 1 && op->kind != FLUSH && op->kind != GET_LENGTH) {
        CHECK_EQ(op->offset % align, 0);
        CHECK_EQ(op->len % align, 0);
    }
    if (op->kind == WRITE) {
        CHECK(!(op->flags & ~(uint32_t)FVD_REQ_FUA));
        CHECK(!op->flags || (host->limits.flags & FVD_LIMIT_CAN_FUA));
    }
}

static int64_t do_transfer(struct mem_host *host, struct mem_file *f, const struct op *op)
{
    uint64_t at = op->offset, end = op->offset + op->len;
    if (op->kind == WRITE && end > f->len) {
        file_resize(f, end);
    }
    for (int i = 0; i < op->iovcnt; i++) {
        uint8_t *mem = op->iov[i].iov_base;
        uint64_t n = op->iov[i].iov_len;
        if (op->kind == WRITE) {
            memcpy(f->data + at, mem, n);
        } else {
            uint64_t have = at < f->len ? f->len - at : 0;
            if (have > n) {
                have = n;
            }
            if (have) {
                memcpy(mem, f->data + at, have);
            }
            memset(mem + have, 0, n - have);
        }
        at += n;
    }
    if (op->kind == WRITE) {
        host->bytes_written += op->len;
        if (op->flags & FVD_REQ_FUA) {
            host->fua_writes++;
            file_settle_range(f, op->offset, op->len);
        }
    }
    return 0;
}

static int64_t base_status(const struct mem_file *f, const struct op *op)
{
    uint64_t n, step = 64 * KIB;
    if (op->offset >= f->len) {
        return (int64_t)op->len;
    }
    n = step - op->offset % step;
    if (n > f->len - op->offset) {
        n = f->len - op->offset;
    }
    if (n > op->len) {
        n = op->len;
    }
    return op->offset / step % 2 ? (int64_t)n : (int64_t)n + FVD_STATUS_DATA;
}

static int64_t do_op_locked(struct mem_host *host, const struct op *op)
{
    struct mem_file *f = &host->files[op->file];
    host->ops[op->kind]++;
    check_op(host, op);
    if (host->fail_errno && op->kind == host->fail_kind && op->file == host->fail_file) {
        if (host->fail_after == 0) {
            return -host->fail_errno;
        }
        host->fail_after--;
    }
    if (!f->there) {
        return op->file == FVD_FILE_IMAGE ? -EBADF : -ENOMEDIUM;
    }
    switch (op->kind) {
    case READ:
    case WRITE:
        return do_transfer(host, f, op);
    case FLUSH:
        file_settle(f);
        return 0;
    case WRITE_ZEROES:
        if (op->offset + op->len > f->len) {
            file_resize(f, op->offset + op->len);
        }
        memset(f->data + op->offset, 0, op->len);
        return 0;
    case DISCARD:
        if (op->offset < f->len) {
            uint64_t n = f->len - op->offset;
            memset(f->data + op->offset, 0, n < op->len ? n : op->len);
        }
        return 0;
    case TRUNCATE:
        file_resize(f, op->offset);
        return 0;
    case GET_LENGTH:
        return (int64_t)f->len;
    case BASE_STATUS:
        return base_status(f, op);
    default:
        CHECK(!"kind");
    }
    return -EINVAL;
}

int64_t do_op(struct mem_host *host, const struct op *op)
{
    pthread_mutex_lock(&host->lock);
    int64_t ret = do_op_locked(host, op);
    pthread_mutex_unlock(&host->lock);
    return ret;
}

/* Callbacks. */

static void start(struct mem_queue *q, struct op op)
{
    if (q->host->mode == INLINE) {
        fvd_complete(q->queue, op.token, do_op(q->host, &op));
        return;
    }
    struct op *copy = malloc(sizeof(*copy));
    CHECK(copy);
    *copy = op;
    copy->next = NULL;
    *q->last = copy;
    q->last = &copy->next;
}

static void cb_read(void *opaque, uint64_t token, uint32_t file, uint64_t offset,
                    const struct iovec *iov, int iovcnt, uint64_t len)
{
    start(opaque, (struct op){ .token = token, .kind = READ, .file = file, .offset = offset,
                               .len = len, .iov = iov, .iovcnt = iovcnt });
}

static void cb_write(void *opaque, uint64_t token, uint32_t file, uint64_t offset,
                     const struct iovec *iov, int iovcnt, uint64_t len, uint32_t flags)
{
    start(opaque, (struct op){ .token = token, .kind = WRITE, .file = file, .offset = offset,
                               .len = len, .iov = iov, .iovcnt = iovcnt, .flags = flags });
}

static void cb_flush(void *opaque, uint64_t token, uint32_t file)
{
    start(opaque, (struct op){ .token = token, .kind = FLUSH, .file = file });
}

static void cb_write_zeroes(void *opaque, uint64_t token, uint32_t file, uint64_t offset,
                            uint64_t len, uint32_t flags)
{
    start(opaque, (struct op){ .token = token, .kind = WRITE_ZEROES, .file = file,
                               .offset = offset, .len = len, .flags = flags });
}

static void cb_discard(void *opaque, uint64_t token, uint32_t file, uint64_t offset, uint64_t len)
{
    start(opaque, (struct op){ .token = token, .kind = DISCARD, .file = file, .offset = offset,
                               .len = len });
}

static void cb_truncate(void *opaque, uint64_t token, uint32_t file, uint64_t length)
{
    start(opaque, (struct op){ .token = token, .kind = TRUNCATE, .file = file, .offset = length });
}

static void cb_get_length(void *opaque, uint64_t token, uint32_t file)
{
    start(opaque, (struct op){ .token = token, .kind = GET_LENGTH, .file = file });
}

static void cb_base_status(void *opaque, uint64_t token, uint64_t offset, uint64_t len)
{
    start(opaque, (struct op){ .token = token, .kind = BASE_STATUS, .file = FVD_FILE_BASE,
                               .offset = offset, .len = len });
}

static void cb_wake(void *opaque)
{
    struct mem_queue *q = opaque;
    pthread_mutex_lock(&q->wake_lock);
    if (q->freed) {
        q->woken_after_free++;
    }
    q->woken = true;
    pthread_cond_signal(&q->wake_cond);
    pthread_mutex_unlock(&q->wake_lock);
}

static uint64_t cb_now_ns(void *opaque)
{
    struct mem_queue *q = opaque;
    return q->now;
}

static int cb_random(void *opaque, void *buf, size_t len)
{
    (void)opaque;
    for (size_t i = 0; i < len; i++) {
        ((uint8_t *)buf)[i] = (uint8_t)(37 * i + 11);
    }
    return 0;
}

static void cb_set_timer(void *opaque, uint64_t at_ns)
{
    struct mem_queue *q = opaque;
    q->timer_at = at_ns;
    q->timer_sets++;
}

static void cb_log(void *opaque, uint32_t level, const char *text)
{
    struct mem_queue *q = opaque;
    CHECK(level <= FVD_LOG_INFO);
    CHECK(text && strlen(text) > 0);
    q->logs++;
}

void mem_host_init(struct mem_host *host, enum mode mode)
{
    memset(host, 0, sizeof(*host));
    pthread_mutex_init(&host->lock, NULL);
    host->mode = mode;
    host->files[FVD_FILE_IMAGE].there = true;
    host->limits = (struct fvd_limits){
        .struct_size = sizeof(host->limits),
        .request_alignment = 1,
        .memory_alignment = 1,
        .flags = FVD_LIMIT_GROWS_ZEROED | FVD_LIMIT_CHEAP_ZEROING | FVD_LIMIT_CAN_FUA,
    };
    host->callbacks = (struct fvd_host_ops){
        .struct_size = sizeof(host->callbacks),
        .read = cb_read,
        .write = cb_write,
        .flush = cb_flush,
        .write_zeroes = cb_write_zeroes,
        .discard = cb_discard,
        .truncate = cb_truncate,
        .get_length = cb_get_length,
        .base_status = cb_base_status,
        .wake = cb_wake,
        .now_ns = cb_now_ns,
        .random_bytes = cb_random,
        .set_timer = cb_set_timer,
        .log = cb_log,
    };
}

void mem_host_free(struct mem_host *host)
{
    for (int i = 0; i < 3; i++) {
        free(host->files[i].data);
        free(host->files[i].durable);
    }
    pthread_mutex_destroy(&host->lock);
}

struct fvd_image *image_new(struct mem_host *host, uint32_t flags)
{
    struct fvd_config config = { .struct_size = sizeof(config), .flags = flags };
    struct fvd_image *image = NULL;
    config.limits[FVD_FILE_IMAGE] = config.limits[FVD_FILE_DATA] = host->limits;
    CHECK_EQ(fvd_image_new(&host->callbacks, &config, &image), 0);
    CHECK(image);
    return image;
}

void queue_init(struct mem_queue *q, struct mem_host *host, struct fvd_image *image)
{
    memset(q, 0, sizeof(*q));
    q->host = host;
    q->last = &q->first;
    q->now = 1000;
    q->timer_at = UINT64_MAX;
    pthread_mutex_init(&q->wake_lock, NULL);
    pthread_cond_init(&q->wake_cond, NULL);
    CHECK_EQ(fvd_queue_new(image, q, &q->queue), 0);
    CHECK(q->queue);
}

void queue_free(struct mem_queue *q)
{
    CHECK(!q->first);
    CHECK_EQ(fvd_queue_is_idle(q->queue), 1);
    CHECK_EQ(fvd_queue_free(&q->queue), 0);
    CHECK(!q->queue);
    pthread_mutex_lock(&q->wake_lock);
    q->freed = true;
    pthread_mutex_unlock(&q->wake_lock);
}

/* Driving. */

bool run_one(struct mem_queue *q)
{
    struct op *op = q->first;
    if (!op) {
        return false;
    }
    if (q->host->mode == REVERSED) {
        struct op **link = &q->first;
        while ((*link)->next) {
            link = &(*link)->next;
        }
        op = *link;
        *link = NULL;
        q->last = link;
    } else {
        q->first = op->next;
        if (!q->first) {
            q->last = &q->first;
        }
    }
    int64_t ret = do_op(q->host, op);
    uint64_t token = op->token;
    free(op);
    fvd_complete(q->queue, token, ret);
    return true;
}

static bool take_wake(struct mem_queue *q)
{
    pthread_mutex_lock(&q->wake_lock);
    bool woken = q->woken;
    q->woken = false;
    pthread_mutex_unlock(&q->wake_lock);
    return woken;
}

void run(struct mem_queue *q)
{
    for (;;) {
        if (take_wake(q)) {
            fvd_queue_run(q->queue);
        } else if (!run_one(q)) {
            break;
        }
    }
}

unsigned requests_done;

void done(void *opaque, int64_t ret, const char *error)
{
    struct result *r = opaque;
    r->calls++;
    r->ret = ret;
    r->order = requests_done++;
    /* API-9 */
    CHECK((ret < 0) == (error != NULL));
    if (error) {
        CHECK(strlen(error) > 0);
        snprintf(r->error, sizeof(r->error), "%s", error);
    }
    if (r->then) {
        r->then(r);
    }
}

int64_t wait_for(struct mem_queue *q, struct result *r)
{
    run(q);
    CHECK_EQ(r->calls, 1);
    return r->ret;
}

int64_t do_create(struct mem_queue *q, uint64_t size, const char *base_name)
{
    struct result r = { 0 };
    struct fvd_create params = {
        .struct_size = sizeof(params),
        .virtual_size = size,
        .block_size = 4096,
        .journal_size = 1 * MIB,
        .base_name = base_name,
        .base_format = base_name ? "raw" : NULL,
    };
    fvd_submit_create(q->queue, &params, done, &r);
    return wait_for(q, &r);
}

int64_t do_open(struct mem_queue *q)
{
    struct result r = { 0 };
    fvd_submit_open(q->queue, done, &r);
    return wait_for(q, &r);
}

int64_t do_close(struct mem_queue *q)
{
    struct result r = { 0 };
    fvd_submit_close(q->queue, done, &r);
    return wait_for(q, &r);
}

int64_t do_read(struct mem_queue *q, void *buf, size_t len, uint64_t offset)
{
    struct result r = { 0 };
    struct iovec iov = { .iov_base = buf, .iov_len = len };
    fvd_submit_read(q->queue, offset, &iov, 1, 0, done, &r);
    return wait_for(q, &r);
}

int64_t do_write(struct mem_queue *q, const void *buf, size_t len, uint64_t offset, uint32_t flags)
{
    struct result r = { 0 };
    struct iovec iov = { .iov_base = (void *)buf, .iov_len = len };
    fvd_submit_write(q->queue, offset, &iov, 1, flags, done, &r);
    return wait_for(q, &r);
}

int64_t do_fill(struct mem_queue *q, uint8_t byte, size_t len, uint64_t offset)
{
    uint8_t *buf = malloc(len);
    CHECK(buf);
    memset(buf, byte, len);
    int64_t ret = do_write(q, buf, len, offset, 0);
    free(buf);
    return ret;
}

int64_t do_flush(struct mem_queue *q)
{
    struct result r = { 0 };
    fvd_submit_flush(q->queue, done, &r);
    return wait_for(q, &r);
}

int64_t do_write_zeroes(struct mem_queue *q, uint64_t offset, uint64_t len, uint32_t flags)
{
    struct result r = { 0 };
    fvd_submit_write_zeroes(q->queue, offset, len, flags, done, &r);
    return wait_for(q, &r);
}

int64_t do_discard(struct mem_queue *q, uint64_t offset, uint64_t len)
{
    struct result r = { 0 };
    fvd_submit_discard(q->queue, offset, len, done, &r);
    return wait_for(q, &r);
}

int64_t do_resize(struct mem_queue *q, uint64_t size, uint32_t flags)
{
    struct result r = { 0 };
    fvd_submit_resize(q->queue, size, flags, done, &r);
    return wait_for(q, &r);
}

int64_t do_status(struct mem_queue *q, uint64_t offset, uint64_t len, struct fvd_block_status *out)
{
    struct result r = { 0 };
    out->struct_size = sizeof(*out);
    fvd_submit_block_status(q->queue, offset, len, out, done, &r);
    return wait_for(q, &r);
}

int64_t do_change_base(struct mem_queue *q, const char *name, const char *format)
{
    struct result r = { 0 };
    fvd_submit_change_base(q->queue, name, format, done, &r);
    return wait_for(q, &r);
}

int64_t do_amend(struct mem_queue *q, const struct fvd_amend *params)
{
    struct result r = { 0 };
    fvd_submit_amend(q->queue, params, done, &r);
    return wait_for(q, &r);
}

int64_t do_make_empty(struct mem_queue *q)
{
    struct result r = { 0 };
    fvd_submit_make_empty(q->queue, done, &r);
    return wait_for(q, &r);
}

int64_t do_check(struct mem_queue *q, struct fvd_check *out)
{
    struct result r = { 0 };
    out->struct_size = sizeof(*out);
    fvd_submit_check(q->queue, out, 0, NULL, done, &r);
    return wait_for(q, &r);
}

void check_bytes(struct mem_queue *q, uint8_t byte, size_t len, uint64_t offset)
{
    uint8_t *buf = malloc(len);
    CHECK(buf);
    memset(buf, 0xee, len);
    CHECK_EQ(do_read(q, buf, len, offset), 0);
    for (size_t i = 0; i < len; i++) {
        if (buf[i] != byte) {
            fprintf(stderr, "byte %llu is %u, not %u\n", (unsigned long long)(offset + i), buf[i], byte);
            exit(1);
        }
    }
    free(buf);
}

void check_base(struct mem_queue *q, size_t len, uint64_t offset)
{
    uint8_t *buf = malloc(len);
    CHECK(buf);
    memset(buf, 0xee, len);
    CHECK_EQ(do_read(q, buf, len, offset), 0);
    for (size_t i = 0; i < len; i++) {
        if (buf[i] != base_byte(offset + i)) {
            fprintf(stderr, "byte %llu is %u, not the base's\n", (unsigned long long)(offset + i), buf[i]);
            exit(1);
        }
    }
    free(buf);
}

/* Disks. */

void disk_start(struct disk *d, enum mode mode, uint64_t size, uint64_t base_len)
{
    memset(d, 0, sizeof(*d));
    mem_host_init(&d->host, mode);
    if (base_len) {
        mem_host_base(&d->host, base_len);
    }
    d->image = image_new(&d->host, 0);
    queue_init(&d->q, &d->host, d->image);
    CHECK_EQ(do_create(&d->q, size, base_len ? "base.raw" : NULL), 0);
    CHECK_EQ(do_open(&d->q), 0);
}

static void disk_drop(struct disk *d)
{
    queue_free(&d->q);
    fvd_image_free(&d->image);
    CHECK(!d->image);
}

void disk_end(struct disk *d)
{
    int64_t ret = do_close(&d->q);
    CHECK(ret == 0 || ret == -EBUSY || ret == -EIO);
    disk_drop(d);
    mem_host_free(&d->host);
}

void disk_reopen(struct disk *d, uint32_t flags)
{
    disk_drop(d);
    d->image = image_new(&d->host, flags);
    queue_init(&d->q, &d->host, d->image);
    CHECK_EQ(do_open(&d->q), 0);
}

void disk_crash_and_reopen(struct disk *d)
{
    mem_host_crash(&d->host);
    disk_reopen(d, 0);
}

const char *temp_name(const char *name)
{
    static char path[512];
    const char *dir = getenv("TMPDIR");
    snprintf(path, sizeof(path), "%s/fvd-test-%d-%s", dir ? dir : "/tmp", (int)getpid(), name);
    return path;
}
