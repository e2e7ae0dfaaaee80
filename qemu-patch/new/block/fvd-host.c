/*
 * FVD block driver: the host of libfvd - I/O, threads and timers for it
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/iov.h"
#include "qemu/lockable.h"
#include "qemu/memalign.h"
#include "qemu/units.h"
#include "system/block-backend.h"

#include "fvd-int.h"

/* --- Waiting for the library -------------------------------------------- */


/* On the queue's thread, like the coroutine that waits: no locking */
void fvd_done(void *opaque, int64_t ret, const char *text)
{
    FVDWait *w = opaque;

    w->ret = ret;
    w->text = g_strdup(text);
    w->done = true;
    if (w->co) {
        aio_co_wake(w->co);
    }
}

int fvd_wait_result(FVDWait *w, Error **errp)
{
    if (w->ret < 0) {
        error_setg(errp, "%s", w->text ?: strerror(-w->ret));
    }
    g_free(w->text);
    return MIN(w->ret, 0);
}

/* The request may have been done before its submit call returned */
int coroutine_fn fvd_co_wait(FVDWait *w, Error **errp)
{
    while (!w->done) {
        w->co = qemu_coroutine_self();
        qemu_coroutine_yield();
    }
    return fvd_wait_result(w, errp);
}

/* Leaves the stack of the library, in which aio_co_wake() may have put us */
static void coroutine_fn fvd_co_leave(AioContext *ctx)
{
    if (ctx == qemu_get_current_aio_context()) {
        aio_co_schedule(ctx, qemu_coroutine_self());
        qemu_coroutine_yield();
    } else {
        aio_co_reschedule_self(ctx);
    }
}

/* --- Host operations ----------------------------------------------------- */

typedef enum FVDOpKind {
    FVD_OP_READ,
    FVD_OP_WRITE,
    FVD_OP_FLUSH,
    FVD_OP_WRITE_ZEROES,
    FVD_OP_DISCARD,
    FVD_OP_TRUNCATE,
    FVD_OP_GET_LENGTH,
    FVD_OP_BASE_STATUS,
} FVDOpKind;

typedef struct FVDOp {
    FVDQueue *q;
    uint64_t token;
    FVDOpKind kind;
    uint32_t file;
    uint32_t flags;
    uint64_t offset;
    uint64_t len;
    const struct iovec *iov;
    int iovcnt;
} FVDOp;

static BdrvRequestFlags fvd_op_flags(const FVDOp *op)
{
    return (op->flags & FVD_REQ_FUA ? BDRV_REQ_FUA : 0) |
           (op->flags & FVD_REQ_MAY_UNMAP ? BDRV_REQ_MAY_UNMAP : 0) |
           (op->flags & FVD_REQ_NO_FALLBACK ? BDRV_REQ_NO_FALLBACK : 0);
}

static int64_t fvd_status_result(int ret, int64_t pnum, uint64_t len)
{
    if (ret < 0) {
        return FVD_STATUS_DATA | len; /* unknown: have it read */
    }
    if (!pnum) {
        return len; /* past the end */
    }
    return MIN(pnum, len) | (ret & BDRV_BLOCK_ZERO ? 0 : FVD_STATUS_DATA);
}

/*
 * A device may have grown, and QEMU does not look by itself: asked when space
 * runs out, so that a guest that was stopped for it goes on afterwards.
 */
static int64_t coroutine_fn GRAPH_RDLOCK fvd_co_file_length(BdrvChild *child)
{
    BlockDriverState *bs = child->bs;
    BdrvChild *below = bdrv_primary_child(bs);
    int64_t ret;

    if (below) {
        ret = fvd_co_file_length(below);
        if (ret < 0) {
            return ret;
        }
    }
    ret = bdrv_co_refresh_total_sectors(bs, bs->total_sectors);
    return ret < 0 ? ret : bdrv_co_getlength(bs);
}

/* A host operation of an open node */
static int64_t coroutine_fn GRAPH_RDLOCK
fvd_co_node_op(BlockDriverState *bs, const FVDOp *op, QEMUIOVector *qiov)
{
    BDRVFvdState *s = bs->opaque;
    BdrvChild *child = op->file == FVD_FILE_BASE ? bs->backing :
                       op->file == FVD_FILE_DATA ? s->data_file : bs->file;
    bool guest_data = op->file == FVD_FILE_DATA ||
                      op->offset >= op->q->engine->data_offset;
    BdrvRequestFlags flags = fvd_op_flags(op);
    int64_t pnum = 0;
    int ret;

    if (!child) {
        return -ENOMEDIUM;
    }

    switch (op->kind) {
    case FVD_OP_READ:
        if (op->file == FVD_FILE_BASE) {
            BLKDBG_CO_EVENT(bs->file, BLKDBG_READ_BACKING_AIO);
        } else if (guest_data) {
            BLKDBG_CO_EVENT(child, BLKDBG_READ_AIO);
        }
        return bdrv_co_preadv(child, op->offset, op->len, qiov, 0);
    case FVD_OP_WRITE:
        if (guest_data) {
            BLKDBG_CO_EVENT(child, BLKDBG_WRITE_AIO);
        }
        return bdrv_co_pwritev(child, op->offset, op->len, qiov, flags);
    case FVD_OP_FLUSH:
        /* The block layer does this for drivers without their own flush */
        BLKDBG_CO_EVENT(child, BLKDBG_FLUSH_TO_OS);
        BLKDBG_CO_EVENT(child, BLKDBG_FLUSH_TO_DISK);
        return bdrv_co_flush(child->bs);
    case FVD_OP_WRITE_ZEROES:
        return bdrv_co_pwrite_zeroes(child, op->offset, op->len, flags);
    case FVD_OP_DISCARD:
        ret = bdrv_co_pdiscard(child, op->offset, op->len);
        return ret == -ENOTSUP ? 0 : ret;
    case FVD_OP_TRUNCATE:
        /* Not exact: a device that is large enough will do */
        return bdrv_co_truncate(child, op->offset, false, PREALLOC_MODE_OFF, 0,
                                NULL);
    case FVD_OP_GET_LENGTH:
        return op->file == FVD_FILE_BASE ? bdrv_co_getlength(child->bs)
                                         : fvd_co_file_length(child);
    case FVD_OP_BASE_STATUS:
        ret = bdrv_co_block_status_above(child->bs, NULL, op->offset, op->len,
                                         &pnum, NULL, NULL);
        return fvd_status_result(ret, pnum, op->len);
    }
    g_assert_not_reached();
}

/* A host operation while an image is created: there is no node yet */
static int64_t coroutine_fn fvd_co_create_op(FVDEngine *e, const FVDOp *op,
                                             QEMUIOVector *qiov)
{
    BlockBackend *blk = op->file == FVD_FILE_BASE ? e->base :
                        op->file == FVD_FILE_DATA ? e->data : e->file;
    BdrvRequestFlags flags = fvd_op_flags(op);
    int64_t pnum = 0;
    int ret;

    if (!blk) {
        return -ENOMEDIUM;
    }

    switch (op->kind) {
    case FVD_OP_READ:
        return blk_co_preadv(blk, op->offset, op->len, qiov, 0);
    case FVD_OP_WRITE:
        return blk_co_pwritev(blk, op->offset, op->len, qiov, flags);
    case FVD_OP_FLUSH:
        return blk_co_flush(blk);
    case FVD_OP_WRITE_ZEROES:
        return blk_co_pwrite_zeroes(blk, op->offset, op->len, flags);
    case FVD_OP_DISCARD:
        return 0;
    case FVD_OP_TRUNCATE:
        return blk_co_truncate(blk, op->offset, false, PREALLOC_MODE_OFF, 0,
                               NULL);
    case FVD_OP_GET_LENGTH:
        return blk_co_getlength(blk);
    case FVD_OP_BASE_STATUS:
        ret = blk_co_block_status_above(blk, NULL, op->offset, op->len, &pnum,
                                        NULL, NULL);
        return fvd_status_result(ret, pnum, op->len);
    }
    g_assert_not_reached();
}

/* Files that are not there: counts how long they would get */
static int64_t fvd_measure_op(FVDEngine *e, const FVDOp *op)
{
    bool in_head = op->file == FVD_FILE_IMAGE && op->offset < FVD_MEASURE_HEAD;
    uint64_t *end;

    if (op->file == FVD_FILE_BASE) {
        return -ENOMEDIUM;
    }
    end = &e->measured_end[op->file];

    switch (op->kind) {
    case FVD_OP_READ:
        iov_memset(op->iov, op->iovcnt, 0, 0, op->len);
        if (in_head) {
            iov_from_buf(op->iov, op->iovcnt, 0, e->measuring + op->offset,
                         MIN(op->len, FVD_MEASURE_HEAD - op->offset));
        }
        return 0;
    case FVD_OP_WRITE:
        if (in_head) {
            iov_to_buf(op->iov, op->iovcnt, 0, e->measuring + op->offset,
                       MIN(op->len, FVD_MEASURE_HEAD - op->offset));
        }
        /* fall through */
    case FVD_OP_WRITE_ZEROES:
        *end = MAX(*end, op->offset + op->len);
        return 0;
    case FVD_OP_TRUNCATE:
        *end = MAX(*end, op->offset);
        return 0;
    case FVD_OP_GET_LENGTH:
        return *end;
    default:
        return 0;
    }
}

static void coroutine_fn fvd_co_op_entry(void *opaque)
{
    FVDOp op = *(FVDOp *)opaque; /* the caller's is gone once we yield */
    FVDEngine *e = op.q->engine;
    BlockDriverState *bs = e->bs;
    QEMUIOVector qiov;
    void *bounce = NULL;
    int64_t ret;

    if (bs) {
        /* Background work has no request to keep drain waiting */
        bdrv_inc_in_flight(bs);
    }

    if (op.iovcnt > IOV_MAX) {
        /* A guest request with the library's own borders added */
        bounce = qemu_memalign(qemu_real_host_page_size(), op.len);
        if (op.kind == FVD_OP_WRITE) {
            iov_to_buf(op.iov, op.iovcnt, 0, bounce, op.len);
        }
        qemu_iovec_init_buf(&qiov, bounce, op.len);
    } else {
        qemu_iovec_init_external(&qiov, (struct iovec *)op.iov, op.iovcnt);
    }

    if (bs) {
        bdrv_graph_co_rdlock();
        ret = fvd_co_node_op(bs, &op, &qiov);
        bdrv_graph_co_rdunlock();
    } else {
        ret = fvd_co_create_op(e, &op, &qiov);
    }

    if (bounce) {
        if (op.kind == FVD_OP_READ && ret >= 0) {
            iov_from_buf(op.iov, op.iovcnt, 0, bounce, op.len);
        }
        qemu_vfree(bounce);
    }

    /* A driver below may have left us in another thread */
    aio_co_reschedule_self(op.q->ctx);

    /* Starts what comes next before the count goes down: no gap for drain */
    fvd_complete(op.q->queue, op.token, ret);
    if (bs) {
        bdrv_dec_in_flight(bs);
    }
}

static void fvd_start(FVDQueue *q, uint64_t token, FVDOp op)
{
    op.q = q;
    op.token = token;
    if (q->engine->measuring) {
        fvd_complete(q->queue, token, fvd_measure_op(q->engine, &op));
    } else {
        qemu_coroutine_enter(qemu_coroutine_create(fvd_co_op_entry, &op));
    }
}

static void fvd_host_read(void *q, uint64_t token, uint32_t file,
                          uint64_t offset, const struct iovec *iov, int iovcnt,
                          uint64_t len)
{
    fvd_start(q, token, (FVDOp) {
        .kind = FVD_OP_READ, .file = file, .offset = offset, .len = len,
        .iov = iov, .iovcnt = iovcnt,
    });
}

static void fvd_host_write(void *q, uint64_t token, uint32_t file,
                           uint64_t offset, const struct iovec *iov,
                           int iovcnt, uint64_t len, uint32_t flags)
{
    fvd_start(q, token, (FVDOp) {
        .kind = FVD_OP_WRITE, .file = file, .offset = offset, .len = len,
        .iov = iov, .iovcnt = iovcnt, .flags = flags,
    });
}

static void fvd_host_flush(void *q, uint64_t token, uint32_t file)
{
    fvd_start(q, token, (FVDOp) { .kind = FVD_OP_FLUSH, .file = file });
}

static void fvd_host_write_zeroes(void *q, uint64_t token, uint32_t file,
                                  uint64_t offset, uint64_t len,
                                  uint32_t flags)
{
    fvd_start(q, token, (FVDOp) {
        .kind = FVD_OP_WRITE_ZEROES, .file = file, .offset = offset,
        .len = len, .flags = flags,
    });
}

static void fvd_host_discard(void *q, uint64_t token, uint32_t file,
                             uint64_t offset, uint64_t len)
{
    fvd_start(q, token, (FVDOp) {
        .kind = FVD_OP_DISCARD, .file = file, .offset = offset, .len = len,
    });
}

static void fvd_host_truncate(void *q, uint64_t token, uint32_t file,
                              uint64_t length)
{
    fvd_start(q, token, (FVDOp) {
        .kind = FVD_OP_TRUNCATE, .file = file, .offset = length,
    });
}

static void fvd_host_get_length(void *q, uint64_t token, uint32_t file)
{
    fvd_start(q, token, (FVDOp) { .kind = FVD_OP_GET_LENGTH, .file = file });
}

static void fvd_host_base_status(void *q, uint64_t token, uint64_t offset,
                                 uint64_t len)
{
    fvd_start(q, token, (FVDOp) {
        .kind = FVD_OP_BASE_STATUS, .file = FVD_FILE_BASE, .offset = offset,
        .len = len,
    });
}

/* From any thread */
static void fvd_host_wake(void *opaque)
{
    FVDQueue *q = opaque;

    if (!qatomic_xchg(&q->woken, true)) {
        if (q->engine->bs) {
            bdrv_inc_in_flight(q->engine->bs);
        }
        qemu_bh_schedule(q->wake_bh);
    }
}

static void fvd_wake_bh(void *opaque)
{
    FVDQueue *q = opaque;
    BlockDriverState *bs = q->engine->bs;

    qatomic_xchg(&q->woken, false); /* before we look for work */
    fvd_queue_run(q->queue);
    if (bs) {
        bdrv_dec_in_flight(bs);
    }
}

static uint64_t fvd_host_now_ns(void *opaque)
{
    return qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
}

/* Called with engine->lock held */
static void fvd_arm_timer(FVDQueue *q)
{
    if (q->timer_at == UINT64_MAX || q->engine->paused) {
        timer_del(&q->timer);
    } else {
        timer_mod_ns(&q->timer, MIN(q->timer_at, INT64_MAX));
    }
}

static void fvd_host_set_timer(void *opaque, uint64_t at_ns)
{
    FVDQueue *q = opaque;

    QEMU_LOCK_GUARD(&q->engine->lock);
    q->timer_at = at_ns;
    fvd_arm_timer(q);
}

static void fvd_timer_cb(void *opaque)
{
    FVDQueue *q = opaque;
    FVDEngine *e = q->engine;
    BlockDriverState *bs = e->bs;
    bool run = false;

    /* Counted first: either drain sees us, or we see that we are paused */
    if (bs) {
        bdrv_inc_in_flight(bs);
    }
    WITH_QEMU_LOCK_GUARD(&e->lock) {
        if (!e->paused && q->timer_at != UINT64_MAX) {
            q->timer_at = UINT64_MAX;
            run = true;
        }
    }
    if (run) {
        fvd_queue_timer(q->queue);
    }
    if (bs) {
        bdrv_dec_in_flight(bs);
    }
}

static void fvd_host_log(void *opaque, uint32_t level, const char *text)
{
    FVDQueue *q = opaque;
    const char *name = q->engine->bs ? bdrv_get_node_name(q->engine->bs) : "";

    switch (level) {
    case FVD_LOG_ERROR:
        error_report("fvd: %s: %s", name, text);
        break;
    case FVD_LOG_WARNING:
        warn_report("fvd: %s: %s", name, text);
        break;
    default:
        /* A recovery that went well is no news for a VM's log */
        break;
    }
}

static void fvd_host_low_space(void *opaque, uint64_t free, uint64_t wanted)
{
    FVDQueue *q = opaque;

    if (q->engine->bs) {
        fvd_space_low(q->engine->bs, free, wanted);
    }
}

static const struct fvd_host_ops fvd_host_ops = {
    .struct_size    = sizeof(struct fvd_host_ops),
    .read           = fvd_host_read,
    .write          = fvd_host_write,
    .flush          = fvd_host_flush,
    .write_zeroes   = fvd_host_write_zeroes,
    .discard        = fvd_host_discard,
    .truncate       = fvd_host_truncate,
    .get_length     = fvd_host_get_length,
    .base_status    = fvd_host_base_status,
    .wake           = fvd_host_wake,
    .now_ns         = fvd_host_now_ns,
    .set_timer      = fvd_host_set_timer,
    .log            = fvd_host_log,
    .low_space      = fvd_host_low_space,
};

/* --- Queues and engines -------------------------------------------------- */

/* The queue of the current thread; made by its first request */
struct fvd_queue *fvd_queue(FVDEngine *e)
{
    AioContext *ctx = qemu_get_current_aio_context();
    FVDQueue *q;

    WITH_QEMU_LOCK_GUARD(&e->lock) {
        QLIST_FOREACH(q, &e->queues, next) {
            if (q->ctx == ctx) {
                return q->queue;
            }
        }
    }

    q = g_new0(FVDQueue, 1);
    q->engine = e;
    q->timer_at = UINT64_MAX;
    q->ctx = ctx;
    aio_context_ref(ctx);
    q->wake_bh = aio_bh_new(ctx, fvd_wake_bh, q);
    aio_timer_init(ctx, &q->timer, QEMU_CLOCK_REALTIME, SCALE_NS,
                   fvd_timer_cb, q);
    if (fvd_queue_new(e->image, q, &q->queue) < 0) {
        /* Our arguments are right, and QEMU aborts when out of memory, too */
        error_report("fvd: %s", fvd_error());
        abort();
    }

    QEMU_LOCK_GUARD(&e->lock);
    QLIST_INSERT_HEAD(&e->queues, q, next);
    return q->queue;
}

/* On the queue's thread, outside the library.  False: not idle yet. */
bool fvd_queue_destroy(FVDQueue *q)
{
    FVDEngine *e = q->engine;

    if (fvd_queue_free(&q->queue) < 0) {
        return false;
    }

    WITH_QEMU_LOCK_GUARD(&e->lock) {
        QLIST_REMOVE(q, next);
        timer_del(&q->timer);
    }
    qemu_bh_delete(q->wake_bh);
    if (qatomic_xchg(&q->woken, false) && e->bs) {
        bdrv_dec_in_flight(e->bs);
    }
    timer_deinit(&q->timer);
    aio_context_unref(q->ctx);
    g_free(q);
    return true;
}

FVDEngine *fvd_engine_new(BlockDriverState *bs, const FVDOptions *options,
                          const struct fvd_limits limits[2], uint32_t flags,
                          Error **errp)
{
    FVDEngine *e = g_new0(FVDEngine, 1);
    struct fvd_config config = {
        .struct_size = sizeof(config),
        .flags = flags | (options->discard_no_unref ?
                          FVD_OPEN_DISCARD_NO_UNREF : 0),
        /* The base is read through the block layer: any alignment will do */
        .limits = {
            [FVD_FILE_IMAGE] = limits[FVD_FILE_IMAGE],
            [FVD_FILE_DATA] = limits[FVD_FILE_DATA],
        },
        .commit_interval_ms = options->commit_interval_ms,
        .metadata_memory = options->metadata_memory,
    };

    if (fvd_image_new(&fvd_host_ops, &config, &e->image) < 0) {
        error_setg(errp, "%s", fvd_error());
        g_free(e);
        return NULL;
    }
    e->bs = bs;
    e->writable = !(flags & FVD_OPEN_RDONLY);
    e->space_wait = options->space_wait;
    e->data_offset = UINT64_MAX;
    qemu_mutex_init(&e->lock);
    QLIST_INIT(&e->queues);
    return e;
}

void fvd_engine_destroy(FVDEngine *e)
{
    assert(QLIST_EMPTY(&e->queues));
    fvd_image_free(&e->image);
    qemu_mutex_destroy(&e->lock);
    g_free(e->measuring);
    g_free(e);
}

/*
 * With nothing in flight.  Visits the thread of each queue and comes back to
 * the one it was called in.
 */
void coroutine_fn fvd_co_engine_free(FVDEngine *e)
{
    AioContext *home = qemu_get_current_aio_context();
    FVDQueue *q;

    while ((q = QLIST_FIRST(&e->queues))) {
        fvd_co_leave(q->ctx);
        while (!fvd_queue_destroy(q)) {
            qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, SCALE_MS);
        }
    }
    aio_co_reschedule_self(home);
    fvd_engine_destroy(e);
}

FVDEngine *coroutine_fn fvd_co_engine_open(BlockDriverState *bs,
                                           const FVDOptions *options,
                                           uint32_t flags, Error **errp)
{
    BDRVFvdState *s = bs->opaque;
    FVDEngine *e = fvd_engine_new(bs, options, s->limits,
                                  flags | (s->metadata_only ?
                                           FVD_OPEN_METADATA : 0), errp);
    struct fvd_info info = { .struct_size = sizeof(info) };
    FVDWait w = {};

    if (!e) {
        return NULL;
    }
    fvd_submit_open(fvd_queue(e), fvd_done, &w);
    if (fvd_co_wait(&w, errp) < 0) {
        fvd_co_engine_free(e);
        return NULL;
    }
    if (fvd_image_info(e->image, &info) == 0 && !info.data_name[0]) {
        e->data_offset = info.data_offset;
    }
    return e;
}

/* Called with s->lock held, or before the first request */
void fvd_pause(FVDEngine *e, bool paused)
{
    FVDQueue *q;

    WITH_QEMU_LOCK_GUARD(&e->lock) {
        e->paused = paused;
        QLIST_FOREACH(q, &e->queues, next) {
            fvd_arm_timer(q);
        }
    }
    /* A write that waited across a drain would hang it */
    fvd_image_wait_for_space(e->image, e->space_wait && !paused);
}

/* What the library may expect of the node @bs as its file */
void GRAPH_RDLOCK fvd_file_limits(BlockDriverState *bs,
                                  struct fvd_limits *limits)
{
    uint32_t granule = MAX(4 * KiB, bs->bl.request_alignment);
    BlockSizes bsz = {};

    GLOBAL_STATE_CODE();

    if (bdrv_probe_blocksizes(bs, &bsz) == 0) {
        granule = MAX(granule, bsz.phys);
    }

    *limits = (struct fvd_limits) {
        .struct_size = sizeof(*limits),
        /* The block layer aligns what a later change of bs->file needs */
        .request_alignment = MIN(MAX(bs->bl.request_alignment, 1), 4 * KiB),
        .memory_alignment = 1,
        .write_granule = MIN(pow2ceil(granule), 64 * KiB),
    };
    if ((bs->supported_truncate_flags & BDRV_REQ_ZERO_WRITE) ||
        bdrv_has_zero_init(bs)) {
        limits->flags |= FVD_LIMIT_GROWS_ZEROED;
    }
    if (bs->supported_zero_flags & BDRV_REQ_NO_FALLBACK) {
        limits->flags |= FVD_LIMIT_CHEAP_ZEROING;
    }
    if (bs->supported_write_flags & BDRV_REQ_FUA) {
        limits->flags |= FVD_LIMIT_CAN_FUA;
    }
}
