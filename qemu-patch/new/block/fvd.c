/*
 * Block driver for FVD (Fast Virtual Disk) images: the thin driver over libfvd
 *
 * The library knows the format; this file gives it coroutines, event loops and
 * bs->file.  Read/write requests that need no metadata change go past the
 * library (fvd_lookup), all others through it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include "block/aio-wait.h"
#include "block/block_int.h"
#include "block/qdict.h"
#include "qapi/error.h"
#include "qapi/qapi-visit-block-core.h"
#include "qapi/qobject-input-visitor.h"
#include "qemu/coroutine-tls.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/iov.h"
#include "qemu/lockable.h"
#include "qemu/memalign.h"
#include "qemu/module.h"
#include "qemu/option.h"
#include "qemu/units.h"
#include "qemu/uuid.h"
#include "qobject/qdict.h"
#include "system/block-backend.h"

#include <fvd.h>

#define FVD_OPT_COMMIT_INTERVAL     "commit-interval"
#define FVD_OPT_METADATA_MEMORY     "metadata-memory"

#define FVD_OPT_BLOCK_SIZE          "block_size"
#define FVD_OPT_JOURNAL_SIZE        "journal_size"
#define FVD_OPT_DETECT_SPARSE_HOLE  "detect_sparse_hole"

/* Keeps one host operation below what the block layer takes at once */
#define FVD_MAX_TRANSFER            (1 * GiB)

/* What get_info reports for an image without copy-on-write blocks */
#define FVD_DEFAULT_CLUSTER_SIZE    (64 * KiB)

typedef struct FVDEngine FVDEngine;

/*
 * The library's queue of one AioContext: all calls on @queue, and all its
 * callbacks but wake, come from the thread that runs @ctx.  For the main
 * loop that is any thread that holds the BQL.
 */
typedef struct FVDQueue {
    FVDEngine *engine;
    AioContext *ctx;            /* referenced: no other can get its address */
    struct fvd_queue *queue;
    QEMUBH *wake_bh;
    bool woken;                 /* atomic: wake_bh is scheduled */
    QEMUTimer timer;
    uint64_t timer_at;          /* UINT64_MAX: off; under FVDEngine.lock */
    QLIST_ENTRY(FVDQueue) next; /* under FVDEngine.lock */
} FVDQueue;

/* One handle of the library and where its I/O goes */
struct FVDEngine {
    BlockDriverState *bs;       /* the open node, or NULL and */
    BlockBackend *file;         /* the file of an image to be created, */
    BlockBackend *base;         /* its base, if that can be read, */
    bool measuring;             /* or nothing is written at all, but counted */
    uint64_t measured_end;

    struct fvd_image *image;    /* thread-safe */
    bool writable;

    QemuMutex lock;             /* never held across a call of the library */
    bool paused;                /* drained: timers do not run; under @lock */
    QLIST_HEAD(, FVDQueue) queues;

    QSLIST_ENTRY(FVDEngine) retired;
};

typedef struct FVDOptions {
    uint64_t commit_interval_ms;
    uint64_t metadata_memory;
} FVDOptions;

typedef struct BDRVFvdState {
    /*
     * NULL: opened for inspection, inactive, or broken by a failed reopen.
     * Read by any thread while it has a request in flight; replaced in the
     * main loop in a drained section, or set by the first request under
     * @open_lock; always under @lock.
     */
    FVDEngine *engine;
    QemuMutex lock;
    bool drained;               /* under @lock */
    bool commit_due;            /* a queue with a running timer went away */
    CoMutex open_lock;

    /* Replaced by activation with reads in flight; freed when drained */
    QSLIST_HEAD(, FVDEngine) retired;

    FVDOptions options;         /* main loop */
    struct fvd_limits limits;   /* of bs->file; set at open */
    struct fvd_info info;       /* when there was an engine last; main loop */
    int64_t virtual_size;       /* atomic */
} BDRVFvdState;

/* --- Waiting for the library -------------------------------------------- */

typedef struct FVDWait {
    Coroutine *co;              /* set while it sleeps */
    bool done;
    int64_t ret;
    char *text;
} FVDWait;

/* On the queue's thread, like the coroutine that waits: no locking */
static void fvd_done(void *opaque, int64_t ret, const char *text)
{
    FVDWait *w = opaque;

    w->ret = ret;
    w->text = g_strdup(text);
    w->done = true;
    if (w->co) {
        aio_co_wake(w->co);
    }
}

static int fvd_wait_result(FVDWait *w, Error **errp)
{
    if (w->ret < 0) {
        error_setg(errp, "%s", w->text ?: strerror(-w->ret));
    }
    g_free(w->text);
    return MIN(w->ret, 0);
}

/* The request may have been done before its submit call returned */
static int coroutine_fn fvd_co_wait(FVDWait *w, Error **errp)
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
           (op->flags & FVD_REQ_MAY_UNMAP ? BDRV_REQ_MAY_UNMAP : 0);
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

/* A host operation of an open node */
static int64_t coroutine_fn GRAPH_RDLOCK
fvd_co_node_op(BlockDriverState *bs, const FVDOp *op, QEMUIOVector *qiov)
{
    BdrvChild *child = op->file == FVD_FILE_BASE ? bs->backing : bs->file;
    BdrvRequestFlags flags = fvd_op_flags(op);
    int64_t pnum = 0;
    int ret;

    if (!child) {
        return -ENOMEDIUM;
    }

    switch (op->kind) {
    case FVD_OP_READ:
        BLKDBG_CO_EVENT(child, BLKDBG_READ_AIO);
        return bdrv_co_preadv(child, op->offset, op->len, qiov, 0);
    case FVD_OP_WRITE:
        BLKDBG_CO_EVENT(child, BLKDBG_WRITE_AIO);
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
        return bdrv_co_getlength(child->bs);
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
    BlockBackend *blk = op->file == FVD_FILE_BASE ? e->base : e->file;
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

/* A file that is not there: counts how long it would get */
static int64_t fvd_measure_op(FVDEngine *e, const FVDOp *op)
{
    if (op->file == FVD_FILE_BASE) {
        return -ENOMEDIUM;
    }

    switch (op->kind) {
    case FVD_OP_READ:
        iov_memset(op->iov, op->iovcnt, 0, 0, op->len);
        return 0;
    case FVD_OP_WRITE:
    case FVD_OP_WRITE_ZEROES:
        e->measured_end = MAX(e->measured_end, op->offset + op->len);
        return 0;
    case FVD_OP_TRUNCATE:
        e->measured_end = MAX(e->measured_end, op->offset);
        return 0;
    case FVD_OP_GET_LENGTH:
        return e->measured_end;
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
};

/* --- Queues and engines -------------------------------------------------- */

/* The queue of the current thread; made by its first request */
static struct fvd_queue *fvd_queue(FVDEngine *e)
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
static bool fvd_queue_destroy(FVDQueue *q)
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

static FVDEngine *fvd_engine_new(BlockDriverState *bs,
                                 const FVDOptions *options,
                                 const struct fvd_limits *limits,
                                 uint32_t flags, Error **errp)
{
    FVDEngine *e = g_new0(FVDEngine, 1);
    struct fvd_config config = {
        .struct_size = sizeof(config),
        .flags = flags,
        /* The base is read through the block layer: any alignment will do */
        .limits = {
            [FVD_FILE_IMAGE] = *limits,
            [FVD_FILE_DATA] = *limits,
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
    qemu_mutex_init(&e->lock);
    QLIST_INIT(&e->queues);
    return e;
}

static void fvd_engine_destroy(FVDEngine *e)
{
    assert(QLIST_EMPTY(&e->queues));
    fvd_image_free(&e->image);
    qemu_mutex_destroy(&e->lock);
    g_free(e);
}

/*
 * With nothing in flight.  Visits the thread of each queue and comes back to
 * the one it was called in.
 */
static void coroutine_fn fvd_co_engine_free(FVDEngine *e)
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

static FVDEngine *coroutine_fn
fvd_co_engine_open(BlockDriverState *bs, const FVDOptions *options,
                   uint32_t flags, Error **errp)
{
    BDRVFvdState *s = bs->opaque;
    FVDEngine *e = fvd_engine_new(bs, options, &s->limits, flags, errp);
    FVDWait w = {};

    if (!e) {
        return NULL;
    }
    fvd_submit_open(fvd_queue(e), fvd_done, &w);
    if (fvd_co_wait(&w, errp) < 0) {
        fvd_co_engine_free(e);
        return NULL;
    }
    return e;
}

/* Called with s->lock held, or before the first request */
static void fvd_pause(FVDEngine *e, bool paused)
{
    FVDQueue *q;

    QEMU_LOCK_GUARD(&e->lock);
    e->paused = paused;
    QLIST_FOREACH(q, &e->queues, next) {
        fvd_arm_timer(q);
    }
}

static void fvd_publish(BDRVFvdState *s, FVDEngine *e)
{
    QEMU_LOCK_GUARD(&s->lock);
    if (e) {
        fvd_pause(e, s->drained);
    }
    qatomic_store_release(&s->engine, e);
}

static void fvd_get_info(BDRVFvdState *s, struct fvd_info *info)
{
    FVDEngine *e = qatomic_load_acquire(&s->engine);

    info->struct_size = sizeof(*info);
    if (!e || fvd_image_info(e->image, info) < 0) {
        *info = s->info;
    }
}

/* Takes over what QEMU's generic code wants to know of a new engine */
static int fvd_take_info(BlockDriverState *bs, FVDEngine *e, Error **errp)
{
    BDRVFvdState *s = bs->opaque;
    struct fvd_info info = { .struct_size = sizeof(info) };

    if (fvd_image_info(e->image, &info) < 0) {
        error_setg(errp, "%s", fvd_error());
        return -EIO;
    }
    s->info = info;
    qatomic_set_i64(&s->virtual_size, info.virtual_size);

    /* Another name may be in use by now for the base that the header names */
    if (strcmp(info.base_name, bs->backing_file)) {
        pstrcpy(bs->auto_backing_file, sizeof(bs->auto_backing_file),
                info.base_name);
        pstrcpy(bs->backing_file, sizeof(bs->backing_file), info.base_name);
        pstrcpy(bs->backing_format, sizeof(bs->backing_format),
                info.base_format);
    }
    return 0;
}

typedef struct FVDSwap {
    BlockDriverState *bs;
    const FVDOptions *options;
    bool open;                  /* open a new engine */
    uint32_t flags;             /* FVD_OPEN_* */
    bool flush_first;           /* leave all as it is if this fails */
    Error **errp;
    int ret;
    bool done;
} FVDSwap;

/* Closes the engine, if there is one, and opens another, if asked */
static int coroutine_fn fvd_co_swap(FVDSwap *swap)
{
    BlockDriverState *bs = swap->bs;
    BDRVFvdState *s = bs->opaque;
    FVDEngine *e = s->engine;
    int ret;

    if (e && e->writable && swap->flush_first) {
        FVDWait w = {};

        fvd_submit_flush(fvd_queue(e), fvd_done, &w);
        ret = fvd_co_wait(&w, swap->errp);
        if (ret < 0) {
            return ret;
        }
    }

    ret = 0;
    if (e) {
        FVDWait w = {};

        fvd_get_info(s, &s->info);
        fvd_publish(s, NULL);
        fvd_submit_close(fvd_queue(e), fvd_done, &w);
        ret = fvd_co_wait(&w, swap->errp);
        fvd_co_engine_free(e);
    }
    while ((e = QSLIST_FIRST(&s->retired))) {
        QSLIST_REMOVE_HEAD(&s->retired, retired);
        fvd_co_engine_free(e);
    }
    if (ret < 0 || !swap->open) {
        return ret;
    }

    e = fvd_co_engine_open(bs, swap->options, swap->flags, swap->errp);
    if (!e) {
        return -EINVAL;
    }
    ret = fvd_take_info(bs, e, swap->errp);
    if (ret < 0 || (swap->flags & FVD_OPEN_NO_IO)) {
        fvd_co_engine_free(e);
        return ret;
    }
    fvd_publish(s, e);
    return 0;
}

static void coroutine_fn fvd_co_swap_entry(void *opaque)
{
    FVDSwap *swap = opaque;

    swap->ret = fvd_co_swap(swap);
    swap->done = true;
    aio_wait_kick();
}

/* In the main loop, with @bs drained or not yet in use */
static int no_coroutine_fn fvd_swap(FVDSwap *swap)
{
    GLOBAL_STATE_CODE();
    assert(!qemu_in_coroutine());

    aio_co_enter(qemu_get_aio_context(),
                 qemu_coroutine_create(fvd_co_swap_entry, swap));
    AIO_WAIT_WHILE_UNLOCKED(NULL, !swap->done);
    return swap->ret;
}

static uint32_t fvd_open_flags(int flags)
{
    return (flags & BDRV_O_RDWR) && !(flags & BDRV_O_INACTIVE)
           ? 0 : FVD_OPEN_RDONLY;
}

/*
 * The engine for a request, or NULL.  An inactive node gets one, read-only,
 * when it is read; it goes when the node is activated.
 */
static FVDEngine *coroutine_fn fvd_co_engine(BlockDriverState *bs)
{
    BDRVFvdState *s = bs->opaque;
    FVDEngine *e = qatomic_load_acquire(&s->engine);

    if (likely(e) || (bs->open_flags & BDRV_O_NO_IO)) {
        return e;
    }

    QEMU_LOCK_GUARD(&s->open_lock);
    if (!s->engine) {
        e = fvd_co_engine_open(bs, &s->options, fvd_open_flags(bs->open_flags),
                               NULL);
        if (e) {
            fvd_publish(s, e);
        }
    }
    return s->engine;
}

/* --- Open, close, reopen, activation ------------------------------------- */

static QemuOptsList fvd_runtime_opts = {
    .name = "fvd",
    .head = QTAILQ_HEAD_INITIALIZER(fvd_runtime_opts.head),
    .desc = {
        {
            .name = FVD_OPT_COMMIT_INTERVAL,
            .type = QEMU_OPT_NUMBER,
            .help = "Seconds after which metadata is committed without a "
                    "flush (default: 5)",
        },
        {
            .name = FVD_OPT_METADATA_MEMORY,
            .type = QEMU_OPT_SIZE,
            .help = "Memory that metadata may take (default: 1 GiB)",
        },
        { /* end of list */ }
    },
};

static const char *const fvd_mutable_opts[] = {
    FVD_OPT_COMMIT_INTERVAL,
    FVD_OPT_METADATA_MEMORY,
    NULL
};

static int fvd_read_options(QDict *options, FVDOptions *out, Error **errp)
{
    QemuOpts *opts = qemu_opts_create(&fvd_runtime_opts, NULL, 0, &error_abort);
    uint64_t interval;
    int ret = -EINVAL;

    if (!qemu_opts_absorb_qdict(opts, options, errp)) {
        goto out;
    }
    interval = qemu_opt_get_number(opts, FVD_OPT_COMMIT_INTERVAL, 5);
    if (interval < 1 || interval > UINT32_MAX) {
        error_setg(errp, "%s must be 1 to %u seconds, not %" PRIu64,
                   FVD_OPT_COMMIT_INTERVAL, UINT32_MAX, interval);
        goto out;
    }
    *out = (FVDOptions) {
        .commit_interval_ms = interval * 1000,
        .metadata_memory = qemu_opt_get_size(opts, FVD_OPT_METADATA_MEMORY, 0),
    };
    ret = 0;
out:
    qemu_opts_del(opts);
    return ret;
}

/* What the library may expect of the node @bs as its file */
static void GRAPH_RDLOCK fvd_file_limits(BlockDriverState *bs,
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

static int fvd_open(BlockDriverState *bs, QDict *options, int flags,
                    Error **errp)
{
    BDRVFvdState *s = bs->opaque;
    FVDSwap swap = { .bs = bs, .open = true, .errp = errp };
    int ret;

    /* First, as attaching a child drains us */
    qemu_mutex_init(&s->lock);
    qemu_co_mutex_init(&s->open_lock);
    QSLIST_INIT(&s->retired);
    s->drained = qatomic_read(&bs->quiesce_counter) > 0;

    ret = bdrv_open_file_child(NULL, options, "file", bs, errp);
    if (ret < 0) {
        goto fail;
    }
    ret = fvd_read_options(options, &s->options, errp);
    if (ret < 0) {
        goto fail;
    }

    bdrv_graph_rdlock_main_loop();
    fvd_file_limits(bs->file->bs, &s->limits);
    bs->supported_zero_flags = BDRV_REQ_MAY_UNMAP |
        (bs->file->bs->supported_zero_flags & BDRV_REQ_NO_FALLBACK);
    bdrv_graph_rdunlock_main_loop();

    /* FUA is not advertised: QEMU flushes instead, and that commits */
    bs->supported_write_flags = 0;
    bs->supported_truncate_flags = BDRV_REQ_ZERO_WRITE;

    swap.options = &s->options;
    swap.flags = fvd_open_flags(flags);
    if (flags & (BDRV_O_NO_IO | BDRV_O_INACTIVE)) {
        /* Another program may be writing: read the header, believe little */
        swap.flags |= FVD_OPEN_NO_IO;
    }
    ret = fvd_swap(&swap);
    if (ret == 0) {
        return 0;
    }
fail:
    qemu_mutex_destroy(&s->lock);
    return ret;
}

static void fvd_close(BlockDriverState *bs)
{
    BDRVFvdState *s = bs->opaque;
    Error *local_err = NULL;
    FVDSwap swap = { .bs = bs, .errp = &local_err };

    GLOBAL_STATE_CODE();

    if (fvd_swap(&swap) < 0) {
        error_reportf_err(local_err, "fvd: closing node '%s': ",
                          bdrv_get_node_name(bs));
    }
    qemu_mutex_destroy(&s->lock);
}

typedef struct FVDReopen {
    FVDOptions options;
    bool swap_after;            /* in commit_post, with the new permissions */
    bool made_read_only;
} FVDReopen;

/*
 * If this fails, the node stays without engine: each request tries again to
 * open one, and fails with EIO.
 */
static void fvd_reopen_swap(BlockDriverState *bs, const FVDOptions *options,
                            int flags)
{
    Error *local_err = NULL;
    FVDSwap swap = {
        .bs = bs, .options = options, .open = true,
        .flags = fvd_open_flags(flags), .errp = &local_err,
    };

    if (fvd_swap(&swap) < 0) {
        error_reportf_err(local_err, "fvd: reopening node '%s': ",
                          bdrv_get_node_name(bs));
    }
}

/*
 * The file still has its old permissions here: what the last writes left is
 * committed now, recovery must wait until commit_post.
 */
static int fvd_reopen_prepare(BDRVReopenState *state, BlockReopenQueue *queue,
                              Error **errp)
{
    BlockDriverState *bs = state->bs;
    BDRVFvdState *s = bs->opaque;
    FVDReopen *r = g_new0(FVDReopen, 1);
    bool writable = state->flags & BDRV_O_RDWR;
    int ret;

    ret = fvd_read_options(state->options, &r->options, errp);
    if (ret < 0) {
        goto fail;
    }

    if (!s->engine) {
        /* Nothing to reopen: inspected, or inactive */
    } else if (s->engine->writable && !writable) {
        FVDSwap swap = {
            .bs = bs, .options = &r->options, .open = true,
            .flags = FVD_OPEN_RDONLY, .flush_first = true, .errp = errp,
        };

        ret = fvd_swap(&swap);
        if (ret < 0) {
            goto fail;
        }
        r->made_read_only = true;
    } else {
        r->swap_after =
            s->engine->writable != (writable &&
                                    !(state->flags & BDRV_O_INACTIVE)) ||
            r->options.commit_interval_ms != s->options.commit_interval_ms ||
            r->options.metadata_memory != s->options.metadata_memory;
    }

    state->opaque = r;
    return 0;
fail:
    g_free(r);
    return ret;
}

static void fvd_reopen_commit(BDRVReopenState *state)
{
    BDRVFvdState *s = state->bs->opaque;
    FVDReopen *r = state->opaque;

    s->options = r->options;
}

static void fvd_reopen_commit_post(BDRVReopenState *state)
{
    BDRVFvdState *s = state->bs->opaque;
    FVDReopen *r = state->opaque;

    if (r->swap_after) {
        fvd_reopen_swap(state->bs, &s->options, state->flags);
    }
    g_free(r);
    state->opaque = NULL;
}

static void fvd_reopen_abort(BDRVReopenState *state)
{
    BDRVFvdState *s = state->bs->opaque;
    FVDReopen *r = state->opaque;

    if (r->made_read_only) {
        fvd_reopen_swap(state->bs, &s->options, state->bs->open_flags);
    }
    g_free(r);
    state->opaque = NULL;
}

/* The block layer has not drained us yet */
static int GRAPH_RDLOCK fvd_inactivate(BlockDriverState *bs)
{
    Error *local_err = NULL;
    FVDSwap swap = { .bs = bs, .flush_first = true, .errp = &local_err };
    int ret;

    bdrv_drained_begin(bs);
    ret = fvd_swap(&swap);
    bdrv_drained_end(bs);

    if (ret < 0) {
        error_reportf_err(local_err, "fvd: inactivating node '%s': ",
                          bdrv_get_node_name(bs));
    }
    return ret;
}

static void coroutine_fn GRAPH_RDLOCK
fvd_co_invalidate_cache(BlockDriverState *bs, Error **errp)
{
    BDRVFvdState *s = bs->opaque;
    FVDEngine *e, *old;

    if (bs->open_flags & BDRV_O_NO_IO) {
        return;
    }

    QEMU_LOCK_GUARD(&s->open_lock);
    e = fvd_co_engine_open(bs, &s->options, fvd_open_flags(bs->open_flags),
                           errp);
    if (!e) {
        return;
    }
    if (fvd_take_info(bs, e, errp) < 0) {
        fvd_co_engine_free(e);
        return;
    }

    /* The old one was only ever read; such reads may be on their way */
    old = s->engine;
    fvd_publish(s, e);
    if (old) {
        QSLIST_INSERT_HEAD(&s->retired, old, retired);
    }
}

/* --- AioContext and drain ------------------------------------------------ */

static void fvd_drop_queue_bh(void *opaque)
{
    FVDQueue *q = opaque;
    BlockDriverState *bs = q->engine->bs;
    BDRVFvdState *s = bs->opaque;
    bool timer = q->timer_at != UINT64_MAX;

    if (fvd_queue_destroy(q) && timer) {
        s->commit_due = true;
    }
}

/*
 * An iothread can go away only after the nodes left it: free what is its own
 * while it runs.  We are drained, so its queue is idle.
 */
static void fvd_drop_queues(FVDEngine *e)
{
    FVDQueue *q, *next;

    QLIST_FOREACH_SAFE(q, &e->queues, next, next) {
        if (q->ctx != qemu_get_aio_context()) {
            aio_wait_bh_oneshot(q->ctx, fvd_drop_queue_bh, q);
        }
    }
}

static void fvd_detach_aio_context(BlockDriverState *bs)
{
    BDRVFvdState *s = bs->opaque;
    FVDEngine *e;

    if (s->engine) {
        fvd_drop_queues(s->engine);
    }
    QSLIST_FOREACH(e, &s->retired, retired) {
        fvd_drop_queues(e);
    }
}

/* Does what the timer of a dropped queue would have done */
static void coroutine_fn fvd_co_late_commit(void *opaque)
{
    BlockDriverState *bs = opaque;
    BDRVFvdState *s = bs->opaque;
    FVDEngine *e = qatomic_load_acquire(&s->engine);

    if (e && e->writable) {
        FVDWait w = {};

        fvd_submit_flush(fvd_queue(e), fvd_done, &w);
        fvd_co_wait(&w, NULL); /* a failure shows at the guest's next flush */
    }
    bdrv_dec_in_flight(bs);
}

/* Timers start what nobody waits for; all else runs on until it is done */
static void fvd_drain_begin(BlockDriverState *bs)
{
    BDRVFvdState *s = bs->opaque;

    QEMU_LOCK_GUARD(&s->lock);
    s->drained = true;
    if (s->engine) {
        fvd_pause(s->engine, true);
    }
}

static void fvd_drain_end(BlockDriverState *bs)
{
    BDRVFvdState *s = bs->opaque;

    WITH_QEMU_LOCK_GUARD(&s->lock) {
        s->drained = false;
        if (s->engine) {
            fvd_pause(s->engine, false);
        }
    }
    if (s->commit_due) {
        s->commit_due = false;
        bdrv_inc_in_flight(bs);
        aio_co_enter(bdrv_get_aio_context(bs),
                     qemu_coroutine_create(fvd_co_late_commit, bs));
    }
}

/* --- Guest requests ------------------------------------------------------ */

QEMU_DEFINE_STATIC_CO_TLS(uint32_t, fvd_slot)

/* A small number of this thread's own, so that lookups do not share lines */
static uint32_t fvd_thread_slot(void)
{
    static uint32_t slots;
    uint32_t slot = get_fvd_slot();

    if (unlikely(!slot)) {
        slot = qatomic_fetch_inc(&slots) + 1;
        set_fvd_slot(slot);
    }
    return slot;
}

static int coroutine_fn GRAPH_RDLOCK
fvd_co_rw(BlockDriverState *bs, int64_t offset, int64_t bytes,
          QEMUIOVector *qiov, size_t qiov_offset, bool write)
{
    FVDEngine *e = fvd_co_engine(bs);
    struct fvd_queue *queue;
    struct fvd_mapping map;
    QEMUIOVector slice;
    FVDWait w = {};
    bool sliced;
    int ret;

    if (!e) {
        return -EIO;
    }
    if (!bytes) {
        return 0;
    }

    if (fvd_lookup(e->image, fvd_thread_slot(), offset, bytes,
                   write ? FVD_LOOKUP_WRITE : 0, &map) == FVD_LOOKUP_DATA) {
        if (map.len == bytes && map.file == FVD_FILE_IMAGE) {
            if (write) {
                BLKDBG_CO_EVENT(bs->file, BLKDBG_WRITE_AIO);
                ret = bdrv_co_pwritev_part(bs->file, map.offset, bytes, qiov,
                                           qiov_offset, 0);
            } else {
                BLKDBG_CO_EVENT(bs->file, BLKDBG_READ_AIO);
                ret = bdrv_co_preadv_part(bs->file, map.offset, bytes, qiov,
                                          qiov_offset, 0);
            }
            fvd_end(e->image, map.token);
            return ret;
        }
        fvd_end(e->image, map.token);
    }

    sliced = qiov_offset || qiov->size != bytes;
    if (sliced) {
        qemu_iovec_init_slice(&slice, qiov, qiov_offset, bytes);
        qiov = &slice;
    }
    queue = fvd_queue(e);
    if (write) {
        fvd_submit_write(queue, offset, qiov->iov, qiov->niov, 0, fvd_done, &w);
    } else {
        fvd_submit_read(queue, offset, qiov->iov, qiov->niov, 0, fvd_done, &w);
    }
    ret = fvd_co_wait(&w, NULL);
    if (sliced) {
        qemu_iovec_destroy(&slice);
    }
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
fvd_co_preadv_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                   QEMUIOVector *qiov, size_t qiov_offset,
                   BdrvRequestFlags flags)
{
    return fvd_co_rw(bs, offset, bytes, qiov, qiov_offset, false);
}

static int coroutine_fn GRAPH_RDLOCK
fvd_co_pwritev_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                    QEMUIOVector *qiov, size_t qiov_offset,
                    BdrvRequestFlags flags)
{
    return fvd_co_rw(bs, offset, bytes, qiov, qiov_offset, true);
}

static int coroutine_fn GRAPH_RDLOCK
fvd_co_pwrite_zeroes(BlockDriverState *bs, int64_t offset, int64_t bytes,
                     BdrvRequestFlags flags)
{
    FVDEngine *e = fvd_co_engine(bs);
    FVDWait w = {};

    if (!e) {
        return -EIO;
    }
    fvd_submit_write_zeroes(fvd_queue(e), offset, bytes,
                            flags & BDRV_REQ_MAY_UNMAP ? FVD_REQ_MAY_UNMAP : 0,
                            fvd_done, &w);
    return fvd_co_wait(&w, NULL);
}

static int coroutine_fn GRAPH_RDLOCK
fvd_co_pdiscard(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    FVDEngine *e = fvd_co_engine(bs);
    FVDWait w = {};

    if (!e) {
        return -EIO;
    }
    fvd_submit_discard(fvd_queue(e), offset, bytes, fvd_done, &w);
    return fvd_co_wait(&w, NULL);
}

/*
 * Not .bdrv_co_flush_to_os: after it QEMU would flush the file once more,
 * with the writes that completed meanwhile.
 */
static int coroutine_fn GRAPH_RDLOCK fvd_co_flush(BlockDriverState *bs)
{
    BDRVFvdState *s = bs->opaque;
    FVDEngine *e = qatomic_load_acquire(&s->engine);
    FVDWait w = {};

    if (!e || !e->writable) {
        return 0;
    }
    fvd_submit_flush(fvd_queue(e), fvd_done, &w);
    return fvd_co_wait(&w, NULL);
}

static int coroutine_fn GRAPH_RDLOCK
fvd_co_block_status(BlockDriverState *bs, bool want_zero, int64_t offset,
                    int64_t bytes, int64_t *pnum, int64_t *map,
                    BlockDriverState **file)
{
    FVDEngine *e = fvd_co_engine(bs);
    struct fvd_block_status st = { .struct_size = sizeof(st) };
    uint32_t align = bs->bl.request_alignment;
    FVDWait w = {};
    int ret;

    if (!e) {
        return -EIO;
    }
    fvd_submit_block_status(fvd_queue(e), offset, bytes, &st, fvd_done, &w);
    ret = fvd_co_wait(&w, NULL);
    if (ret < 0) {
        return ret;
    }

    /* The end of a base need not be aligned */
    *pnum = QEMU_ALIGN_DOWN(st.len, align);
    if (!*pnum) {
        *pnum = align;
        /* Past its end a base reads as zero, so that is right for both parts */
        return st.place == FVD_PLACE_BASE ? 0 : BDRV_BLOCK_DATA;
    }

    switch (st.place) {
    case FVD_PLACE_BASE:
        return 0;
    case FVD_PLACE_ZERO:
        return BDRV_BLOCK_ZERO;
    default:
        if (st.file != FVD_FILE_IMAGE) {
            return BDRV_BLOCK_DATA;
        }
        *map = st.offset;
        *file = bs->file->bs;
        return BDRV_BLOCK_DATA | BDRV_BLOCK_OFFSET_VALID | BDRV_BLOCK_RECURSE;
    }
}

static int64_t coroutine_fn fvd_co_getlength(BlockDriverState *bs)
{
    BDRVFvdState *s = bs->opaque;

    return qatomic_read_i64(&s->virtual_size);
}

/* Preallocates guest bytes that are new and read as zero */
static int coroutine_fn fvd_co_preallocate(FVDEngine *e, int64_t from,
                                           int64_t to, bool full,
                                           Error **errp)
{
    size_t step = MIN(to - from, 2 * MiB);
    struct iovec iov;
    void *zeroes;
    int ret = 0;

    if (!full) {
        FVDWait w = {};

        fvd_submit_write_zeroes(fvd_queue(e), from, to - from, 0, fvd_done,
                                &w);
        return fvd_co_wait(&w, errp);
    }

    zeroes = qemu_memalign(qemu_real_host_page_size(), step);
    memset(zeroes, 0, step);
    while (from < to && ret == 0) {
        FVDWait w = {};

        iov = (struct iovec) { zeroes, MIN(to - from, step) };
        fvd_submit_write(fvd_queue(e), from, &iov, 1, 0, fvd_done, &w);
        ret = fvd_co_wait(&w, errp);
        from += iov.iov_len;
    }
    qemu_vfree(zeroes);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
fvd_co_truncate(BlockDriverState *bs, int64_t offset, bool exact,
                PreallocMode prealloc, BdrvRequestFlags flags, Error **errp)
{
    BDRVFvdState *s = bs->opaque;
    FVDEngine *e = fvd_co_engine(bs);
    int64_t old_size = qatomic_read_i64(&s->virtual_size);
    FVDWait w = {};
    int ret;

    if (!e) {
        error_setg(errp, "The image is not open");
        return -EIO;
    }
    if (offset < old_size && prealloc != PREALLOC_MODE_OFF) {
        error_setg(errp, "Preallocation mode '%s' makes no sense when the disk "
                   "is made smaller", PreallocMode_str(prealloc));
        return -EINVAL;
    }

    fvd_submit_resize(fvd_queue(e), offset,
                      flags & BDRV_REQ_ZERO_WRITE ? FVD_REQ_ZEROED : 0,
                      fvd_done, &w);
    ret = fvd_co_wait(&w, errp);
    if (ret < 0) {
        return ret;
    }
    qatomic_set_i64(&s->virtual_size, offset);

    if (offset > old_size && (prealloc == PREALLOC_MODE_FALLOC ||
                              prealloc == PREALLOC_MODE_FULL)) {
        ret = fvd_co_preallocate(e, old_size, offset,
                                 prealloc == PREALLOC_MODE_FULL, errp);
    }
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
fvd_co_change_backing_file(BlockDriverState *bs, const char *backing_file,
                           const char *backing_fmt)
{
    FVDEngine *e = fvd_co_engine(bs);
    Error *local_err = NULL;
    FVDWait w = {};
    int ret;

    if (!e) {
        return -EIO;
    }
    fvd_submit_change_base(fvd_queue(e), backing_file, backing_fmt, fvd_done,
                           &w);
    ret = fvd_co_wait(&w, &local_err);
    if (ret < 0) {
        error_reportf_err(local_err, "fvd: node '%s': ",
                          bdrv_get_node_name(bs));
        return ret;
    }

    pstrcpy(bs->auto_backing_file, sizeof(bs->auto_backing_file),
            backing_file ?: "");
    pstrcpy(bs->backing_file, sizeof(bs->backing_file), backing_file ?: "");
    pstrcpy(bs->backing_format, sizeof(bs->backing_format), backing_fmt ?: "");
    return 0;
}

static void fvd_check_finding(void *opaque, const char *text)
{
    fprintf(stderr, "ERROR %s\n", text);
}

static int coroutine_fn GRAPH_RDLOCK
fvd_co_check(BlockDriverState *bs, BdrvCheckResult *result, BdrvCheckMode fix)
{
    BDRVFvdState *s = bs->opaque;
    FVDEngine *e = fvd_co_engine(bs);
    struct fvd_check check = { .struct_size = sizeof(check) };
    struct fvd_info info;
    Error *local_err = NULL;
    FVDWait w = {};
    int ret;

    if (!e) {
        return -EIO;
    }
    fvd_submit_check(fvd_queue(e), &check, fvd_check_finding, fvd_done, &w);
    ret = fvd_co_wait(&w, &local_err);
    if (ret < 0) {
        error_report_err(local_err);
        result->check_errors++;
        return ret;
    }

    fvd_get_info(s, &info);
    result->corruptions = MIN(check.corruptions, INT_MAX);
    result->leaks = MIN(DIV_ROUND_UP(check.leaked, info.block_size ?:
                                     FVD_DEFAULT_CLUSTER_SIZE), INT_MAX);
    result->image_end_offset = check.image_end;
    result->bfi.total_clusters = check.blocks_total;
    result->bfi.allocated_clusters = check.blocks_present;
    return 0;
}

/* --- Information --------------------------------------------------------- */

static int fvd_probe_image(const uint8_t *buf, int buf_size,
                           const char *filename)
{
    /* Version 1, too, is ours: it gets an error that says what to do */
    return fvd_probe(buf, buf_size) > 0 ? 100 : 0;
}

static void GRAPH_RDLOCK fvd_refresh_limits(BlockDriverState *bs, Error **errp)
{
    struct fvd_info info;

    fvd_get_info(bs->opaque, &info);

    /*
     * As the file's, but a disk is a multiple of 512 bytes long, and its last
     * sector must be reachable: the library or the file aligns the rest.
     */
    if (bs->file) {
        bs->bl.request_alignment = MIN(bs->file->bs->bl.request_alignment,
                                       BDRV_SECTOR_SIZE);
    }
    bs->bl.max_transfer = MIN_NON_ZERO(bs->bl.max_transfer, FVD_MAX_TRANSFER);
    bs->bl.pwrite_zeroes_alignment = info.block_size;
    bs->bl.pdiscard_alignment = info.block_size;
}

static int GRAPH_RDLOCK fvd_has_zero_init(BlockDriverState *bs)
{
    struct fvd_info info;

    fvd_get_info(bs->opaque, &info);
    return !(info.flags & FVD_INFO_NON_ZEROING);
}

static int coroutine_fn GRAPH_RDLOCK
fvd_co_get_info(BlockDriverState *bs, BlockDriverInfo *bdi)
{
    BDRVFvdState *s = bs->opaque;
    FVDEngine *e = qatomic_load_acquire(&s->engine);
    struct fvd_info info;

    fvd_get_info(s, &info);
    bdi->cluster_size = info.block_size ?: FVD_DEFAULT_CLUSTER_SIZE;
    /* Recovered if we write to it ourselves */
    bdi->is_dirty = !(info.flags & FVD_INFO_CLEAN) && !(e && e->writable);
    return 0;
}

static ImageInfoSpecific * GRAPH_RDLOCK
fvd_get_specific_info(BlockDriverState *bs, Error **errp)
{
    ImageInfoSpecific *spec = g_new(ImageInfoSpecific, 1);
    struct fvd_info info;
    QemuUUID uuid;

    fvd_get_info(bs->opaque, &info);
    memcpy(uuid.data, info.uuid, sizeof(uuid.data));

    *spec = (ImageInfoSpecific) {
        .type = IMAGE_INFO_SPECIFIC_KIND_FVD,
        .u.fvd.data = g_new(ImageInfoSpecificFvd, 1),
    };
    *spec->u.fvd.data = (ImageInfoSpecificFvd) {
        .version            = info.version,
        .uuid               = qemu_uuid_unparse_strdup(&uuid),
        .clean              = info.flags & FVD_INFO_CLEAN,
        .data_offset        = info.data_offset,
        .journal_size       = info.journal_size,
        .has_block_size     = info.block_size,
        .block_size         = info.block_size,
        .has_base_length    = info.flags & FVD_INFO_HAS_BASE_LENGTH,
        .base_length        = info.base_length,
        .has_covered_length = info.block_size,
        .covered_length     = info.covered,
        .has_blocks_total   = info.block_size,
        .blocks_total       = info.blocks,
        .generation         = info.generation,
        .epoch              = info.epoch,
    };
    return spec;
}

/* --- Creation ------------------------------------------------------------ */

/*
 * The base, for its length and its holes, or NULL.  Whoever writes to it
 * makes this fail, as a length that can change must not be recorded.
 */
static BlockBackend *coroutine_fn GRAPH_UNLOCKED
fvd_co_open_base(BlockDriverState *file, const char *name, const char *format,
                 bool content, Error **errp)
{
    QDict *options;
    BlockDriverState *bs;
    BlockBackend *blk;
    char *full;

    full = bdrv_get_full_backing_filename_from_filename(file->filename, name,
                                                        errp);
    if (!full) {
        return NULL;
    }
    options = qdict_new();
    qdict_put_str(options, "driver", format);
    bs = bdrv_co_open(full, NULL, options, content ? 0 : BDRV_O_NO_BACKING,
                      errp);
    g_free(full);
    if (!bs) {
        return NULL;
    }
    blk = blk_co_new_with_bs(bs, BLK_PERM_CONSISTENT_READ,
                             BLK_PERM_CONSISTENT_READ |
                             BLK_PERM_WRITE_UNCHANGED, errp);
    if (blk) {
        blk_set_allow_write_beyond_eof(blk, true); /* reads, too */
    }
    bdrv_co_unref(bs);
    return blk;
}

static int coroutine_fn GRAPH_UNLOCKED
fvd_co_create(BlockdevCreateOptions *opts, Error **errp)
{
    BlockdevCreateOptionsFvd *o = &opts->u.fvd;
    const char *base_format = NULL;
    BlockDriverState *bs = NULL;
    BlockBackend *blk = NULL, *base = NULL;
    struct fvd_limits limits;
    FVDOptions options = {};
    FVDEngine *e = NULL;
    Error *local_err = NULL;
    FVDWait w = {};
    int ret = -EINVAL;

    assert(opts->driver == BLOCKDEV_DRIVER_FVD);

    if (o->has_backing_fmt) {
        base_format = BlockdevDriver_str(o->backing_fmt);
    }
    if (o->backing_file && !*o->backing_file) {
        error_setg(errp, "backing-file must not be empty");
        return -EINVAL;
    }
    if (o->backing_file && !base_format) {
        error_setg(errp, "The format of backing-file '%s' must be given "
                   "(backing-fmt): it is never guessed", o->backing_file);
        return -EINVAL;
    }
    if (!o->backing_file && base_format) {
        error_setg(errp, "backing-fmt '%s' is given without backing-file",
                   base_format);
        return -EINVAL;
    }
    if (!o->backing_file && o->detect_sparse_hole) {
        error_setg(errp, "detect-sparse-hole %" PRIu64 " is given without "
                   "backing-file", o->detect_sparse_hole);
        return -EINVAL;
    }
    if (o->size > INT64_MAX) {
        error_setg(errp, "size %" PRIu64 " is too large", o->size);
        return -EINVAL;
    }
    if (o->block_size > UINT32_MAX) {
        error_setg(errp, "block-size %" PRIu64 " is too large", o->block_size);
        return -EINVAL;
    }

    bs = bdrv_co_open_blockdev_ref(o->file, errp);
    if (!bs) {
        return -EIO;
    }
    blk = blk_co_new_with_bs(bs, BLK_PERM_WRITE | BLK_PERM_RESIZE, BLK_PERM_ALL,
                             errp);
    if (!blk) {
        ret = -EPERM;
        goto out;
    }
    blk_set_allow_write_beyond_eof(blk, true);

    if (o->backing_file) {
        base = fvd_co_open_base(bs, o->backing_file, base_format,
                                o->detect_sparse_hole, &local_err);
        if (!base && o->detect_sparse_hole) {
            error_propagate_prepend(errp, local_err, "detect-sparse-hole "
                                    "needs to read backing-file '%s': ",
                                    o->backing_file);
            goto out;
        }
        /* Without detection its length is left open */
        error_free(local_err);
    }

    ret = blk_co_truncate(blk, 0, false, PREALLOC_MODE_OFF, 0, errp);
    if (ret < 0) {
        goto out;
    }

    bdrv_graph_co_rdlock();
    fvd_file_limits(bs, &limits);
    bdrv_graph_co_rdunlock();
    e = fvd_engine_new(NULL, &options, &limits, 0, errp);
    if (!e) {
        ret = -EINVAL;
        goto out;
    }
    e->file = blk;
    e->base = base;

    fvd_submit_create(fvd_queue(e), &(struct fvd_create) {
        .struct_size = sizeof(struct fvd_create),
        .virtual_size = o->size,
        .block_size = o->block_size,
        .preallocation = o->preallocation == PREALLOC_MODE_METADATA ?
                             FVD_PREALLOC_METADATA :
                         o->preallocation == PREALLOC_MODE_FALLOC ?
                             FVD_PREALLOC_FALLOC :
                         o->preallocation == PREALLOC_MODE_FULL ?
                             FVD_PREALLOC_FULL : FVD_PREALLOC_OFF,
        .journal_size = o->journal_size,
        .detect_sparse_hole = o->detect_sparse_hole,
        .base_name = o->backing_file,
        .base_format = base_format,
    }, fvd_done, &w);
    ret = fvd_co_wait(&w, errp);
    fvd_co_engine_free(e);
out:
    blk_co_unref(base);
    blk_co_unref(blk);
    bdrv_co_unref(bs);
    return ret;
}

static QemuOptsList fvd_create_opts = {
    .name = "fvd-create-opts",
    .head = QTAILQ_HEAD_INITIALIZER(fvd_create_opts.head),
    .desc = {
        {
            .name = BLOCK_OPT_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Virtual disk size"
        },
        {
            .name = BLOCK_OPT_BACKING_FILE,
            .type = QEMU_OPT_STRING,
            .help = "File name of a base image"
        },
        {
            .name = BLOCK_OPT_BACKING_FMT,
            .type = QEMU_OPT_STRING,
            .help = "Image format of the base image (mandatory with one)"
        },
        {
            .name = FVD_OPT_BLOCK_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Copy-on-write unit in bytes, a power of two from 4k to "
                    "2M (default: the smallest with a bitmap up to 2M)"
        },
        {
            .name = BLOCK_OPT_CLUSTER_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Another name for block_size"
        },
        {
            .name = FVD_OPT_JOURNAL_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Journal size in bytes, 1M to 256M (default: 16M)"
        },
        {
            .name = FVD_OPT_DETECT_SPARSE_HOLE,
            .type = QEMU_OPT_STRING,
            .help = "Look for zeroes in the base image: off, on (one block) "
                    "or the shortest run in bytes (default: off)"
        },
        {
            .name = BLOCK_OPT_PREALLOC,
            .type = QEMU_OPT_STRING,
            .help = "Preallocation mode (allowed values: off, metadata, "
                    "falloc, full)"
        },
        { /* end of list */ }
    }
};

/* 2011's option said on and off; 1 means one block to the library */
static bool fvd_parse_hole(const char *text, uint64_t *size, Error **errp)
{
    if (!strcmp(text, "on") || !strcmp(text, "off")) {
        *size = !strcmp(text, "on");
        return true;
    }
    if (qemu_strtosz(text, NULL, size) < 0) {
        error_setg(errp, "%s must be on, off or a size, not '%s'",
                   FVD_OPT_DETECT_SPARSE_HOLE, text);
        return false;
    }
    return true;
}

static int coroutine_fn GRAPH_UNLOCKED
fvd_co_create_opts(BlockDriver *drv, const char *filename, QemuOpts *opts,
                   Error **errp)
{
    static const QDictRenames renames[] = {
        { BLOCK_OPT_BACKING_FILE,       "backing-file" },
        { BLOCK_OPT_BACKING_FMT,        "backing-fmt" },
        { FVD_OPT_BLOCK_SIZE,           "block-size" },
        { FVD_OPT_JOURNAL_SIZE,         "journal-size" },
        { FVD_OPT_DETECT_SPARSE_HOLE,   "detect-sparse-hole" },
        { NULL, NULL },
    };
    BlockdevCreateOptions *create_options = NULL;
    BlockDriverState *bs = NULL;
    const char *block_size, *alias, *hole;
    QDict *qdict;
    Visitor *v;
    int ret = -EINVAL;

    qdict = qemu_opts_to_qdict_filtered(opts, NULL, &fvd_create_opts, true);

    block_size = qdict_get_try_str(qdict, FVD_OPT_BLOCK_SIZE);
    alias = qdict_get_try_str(qdict, BLOCK_OPT_CLUSTER_SIZE);
    if (alias && block_size && strcmp(alias, block_size)) {
        error_setg(errp, "%s %s and %s %s are the same option with different "
                   "values", BLOCK_OPT_CLUSTER_SIZE, alias, FVD_OPT_BLOCK_SIZE,
                   block_size);
        goto out;
    }
    if (alias) {
        g_autofree char *value = g_strdup(alias);

        qdict_del(qdict, BLOCK_OPT_CLUSTER_SIZE);
        qdict_put_str(qdict, FVD_OPT_BLOCK_SIZE, value);
    }
    hole = qdict_get_try_str(qdict, FVD_OPT_DETECT_SPARSE_HOLE);
    if (hole) {
        uint64_t size;

        if (!fvd_parse_hole(hole, &size, errp)) {
            goto out;
        }
        qdict_put_int(qdict, FVD_OPT_DETECT_SPARSE_HOLE, size);
    }
    if (!qdict_rename_keys(qdict, renames, errp)) {
        goto out;
    }

    /* Create and open the file (protocol layer) */
    ret = bdrv_co_create_file(filename, opts, errp);
    if (ret < 0) {
        goto out;
    }
    bs = bdrv_co_open(filename, NULL, NULL,
                      BDRV_O_RDWR | BDRV_O_RESIZE | BDRV_O_PROTOCOL, errp);
    if (!bs) {
        ret = -EIO;
        goto out;
    }

    ret = -EINVAL;
    qdict_put_str(qdict, "driver", "fvd");
    qdict_put_str(qdict, "file", bs->node_name);
    v = qobject_input_visitor_new_flat_confused(qdict, errp);
    if (!v) {
        goto out;
    }
    visit_type_BlockdevCreateOptions(v, NULL, &create_options, errp);
    visit_free(v);
    if (!create_options) {
        goto out;
    }

    /* Silently round up size */
    create_options->u.fvd.size = ROUND_UP(create_options->u.fvd.size,
                                          BDRV_SECTOR_SIZE);
    ret = fvd_co_create(create_options, errp);
out:
    if (ret < 0) {
        bdrv_graph_co_rdlock();
        bdrv_co_delete_file_noerr(bs);
        bdrv_graph_co_rdunlock();
    }
    qobject_unref(qdict);
    bdrv_co_unref(bs);
    qapi_free_BlockdevCreateOptions(create_options);
    return ret;
}

/* Has the library create an image nowhere, and looks how long it got */
static BlockMeasureInfo *fvd_measure(QemuOpts *opts, BlockDriverState *in_bs,
                                     Error **errp)
{
    g_autofree char *backing_file = NULL;
    struct fvd_limits limits = {
        .struct_size = sizeof(limits),
        .flags = FVD_LIMIT_GROWS_ZEROED | FVD_LIMIT_CHEAP_ZEROING,
    };
    struct fvd_create params = { .struct_size = sizeof(params) };
    FVDOptions options = {};
    BlockMeasureInfo *info = NULL;
    FVDEngine *e;
    FVDWait w = {};
    uint64_t block_size;
    int64_t size;

    if (in_bs) {
        size = bdrv_getlength(in_bs);
        if (size < 0) {
            error_setg_errno(errp, -size, "Unable to get image size");
            return NULL;
        }
    } else {
        size = qemu_opt_get_size_del(opts, BLOCK_OPT_SIZE, 0);
    }
    params.virtual_size = ROUND_UP(size, BDRV_SECTOR_SIZE);
    block_size = qemu_opt_get_size_del(opts, BLOCK_OPT_CLUSTER_SIZE, 0);
    block_size = qemu_opt_get_size_del(opts, FVD_OPT_BLOCK_SIZE, block_size);
    params.block_size = MIN(block_size, UINT32_MAX);
    params.journal_size = qemu_opt_get_size_del(opts, FVD_OPT_JOURNAL_SIZE, 0);
    backing_file = qemu_opt_get_del(opts, BLOCK_OPT_BACKING_FILE);
    if (backing_file) {
        params.base_name = backing_file;
        params.base_format = "raw"; /* as good as any other here */
    }

    e = fvd_engine_new(NULL, &options, &limits, 0, errp);
    if (!e) {
        return NULL;
    }
    e->measuring = true;
    fvd_submit_create(fvd_queue(e), &params, fvd_done, &w);
    AIO_WAIT_WHILE_UNLOCKED(NULL, !w.done);

    if (fvd_wait_result(&w, errp) == 0) {
        info = g_new0(BlockMeasureInfo, 1);
        info->required = e->measured_end;
        /* A flat image is as long from the start as it can get */
        info->fully_allocated = e->measured_end;
    }
    AIO_WAIT_WHILE_UNLOCKED(NULL, !fvd_queue_destroy(QLIST_FIRST(&e->queues)));
    fvd_engine_destroy(e);
    return info;
}

static BlockDriver bdrv_fvd = {
    .format_name                    = "fvd",
    .instance_size                  = sizeof(BDRVFvdState),
    .create_opts                    = &fvd_create_opts,
    .mutable_opts                   = fvd_mutable_opts,
    .is_format                      = true,
    .supports_backing               = true,

    .bdrv_probe                     = fvd_probe_image,
    .bdrv_open                      = fvd_open,
    .bdrv_close                     = fvd_close,
    .bdrv_reopen_prepare            = fvd_reopen_prepare,
    .bdrv_reopen_commit             = fvd_reopen_commit,
    .bdrv_reopen_commit_post        = fvd_reopen_commit_post,
    .bdrv_reopen_abort              = fvd_reopen_abort,
    /* WRITE and RESIZE on a child with metadata while writable and active */
    .bdrv_child_perm                = bdrv_default_perms,
    .bdrv_inactivate                = fvd_inactivate,
    .bdrv_co_invalidate_cache       = fvd_co_invalidate_cache,

    .bdrv_detach_aio_context        = fvd_detach_aio_context,
    .bdrv_drain_begin               = fvd_drain_begin,
    .bdrv_drain_end                 = fvd_drain_end,

    .bdrv_co_create                 = fvd_co_create,
    .bdrv_co_create_opts            = fvd_co_create_opts,
    .bdrv_measure                   = fvd_measure,

    .bdrv_co_preadv_part            = fvd_co_preadv_part,
    .bdrv_co_pwritev_part           = fvd_co_pwritev_part,
    .bdrv_co_pwrite_zeroes          = fvd_co_pwrite_zeroes,
    .bdrv_co_pdiscard               = fvd_co_pdiscard,
    .bdrv_co_flush                  = fvd_co_flush,
    .bdrv_co_block_status           = fvd_co_block_status,
    .bdrv_co_truncate               = fvd_co_truncate,
    .bdrv_co_getlength              = fvd_co_getlength,
    .bdrv_co_change_backing_file    = fvd_co_change_backing_file,
    .bdrv_co_check                  = fvd_co_check,

    .bdrv_refresh_limits            = fvd_refresh_limits,
    .bdrv_has_zero_init             = fvd_has_zero_init,
    .bdrv_co_get_info               = fvd_co_get_info,
    .bdrv_get_specific_info         = fvd_get_specific_info,
};

static void bdrv_fvd_init(void)
{
    bdrv_register(&bdrv_fvd);
}

block_init(bdrv_fvd_init);
