/*
 * Block driver for FVD (Fast Virtual Disk) images: the thin driver over libfvd
 *
 * The library knows the format; fvd-host.c gives it coroutines, event loops and
 * bs->file.  Read/write requests that need no metadata change go past the
 * library (fvd_lookup), all others through it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include "block/aio-wait.h"
#include "block/block-io.h"
#include "qapi/error.h"
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
#include "system/block-backend.h"

#include "fvd-int.h"

#define FVD_OPT_COMMIT_INTERVAL     "commit-interval"
#define FVD_OPT_METADATA_MEMORY     "metadata-memory"
#define FVD_OPT_DISCARD_NO_UNREF    "discard-no-unref"

/* Keeps one host operation below what the block layer takes at once */
#define FVD_MAX_TRANSFER            (1 * GiB)

/* What get_info reports for an image without copy-on-write blocks */
#define FVD_DEFAULT_CLUSTER_SIZE    (64 * KiB)

/* --- The engine of a node ------------------------------------------------ */

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

    swap->done = false;
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
        {
            .name = FVD_OPT_DISCARD_NO_UNREF,
            .type = QEMU_OPT_BOOL,
            .help = "Discarded chunks keep their place (default: off)",
        },
        {
            .name = FVD_OPT_SPACE_WAIT,
            .type = QEMU_OPT_BOOL,
            .help = "Writes that find no storage wait for space-helper "
                    "(default: on if there is one)",
        },
        { /* end of list */ }
    },
};

static const char *const fvd_mutable_opts[] = {
    FVD_OPT_COMMIT_INTERVAL,
    FVD_OPT_METADATA_MEMORY,
    FVD_OPT_DISCARD_NO_UNREF,
    FVD_OPT_SPACE_WAIT,
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
        .discard_no_unref = qemu_opt_get_bool(opts, FVD_OPT_DISCARD_NO_UNREF,
                                              false),
    };
    ret = fvd_read_space_options(options, opts, out, errp);
out:
    qemu_opts_del(opts);
    return ret;
}

/*
 * The data file by the name that the image has for it: never anything but a
 * plain file or device, which is not probed for a format.  Relative to the
 * directory of the image.
 */
static BdrvChild *fvd_open_named_data_file(BlockDriverState *bs, QDict *options,
                                           Error **errp)
{
    BDRVFvdState *s = bs->opaque;
    const char *name = s->info.data_name;
    g_autofree char *full = NULL;

    if (strcmp(s->info.data_format, "raw")) {
        error_setg(errp, "Data file '%s' has format '%s': it is opened only if "
                   "given as 'data-file'", name, s->info.data_format);
        return NULL;
    }
    if (path_is_absolute(name)) {
        full = g_strdup(name);
    } else {
        g_autofree char *dir = NULL;

        bdrv_graph_rdlock_main_loop();
        dir = bdrv_dirname(bs->file->bs, errp);
        bdrv_graph_rdunlock_main_loop();
        if (!dir) {
            error_prepend(errp, "Data file '%s' must be given as 'data-file': ",
                          name);
            return NULL;
        }
        full = g_strconcat(dir, name, NULL);
    }
    return bdrv_open_child(full, options, "data-file", bs, &child_of_bds,
                           BDRV_CHILD_DATA, false, errp);
}

/* What the header says is known; the engine is not open yet */
static int fvd_open_data_file(BlockDriverState *bs, QDict *options, int flags,
                              Error **errp)
{
    BDRVFvdState *s = bs->opaque;
    bool wanted = s->info.data_name[0];
    Error *local_err = NULL;

    if (wanted && (flags & BDRV_O_NO_IO)) {
        /* A look at the metadata must not open what a stranger's image names */
        qdict_extract_subqdict(options, NULL, "data-file.");
        qdict_del(options, "data-file");
    } else {
        s->data_file = bdrv_open_child(NULL, options, "data-file", bs,
                                       &child_of_bds, BDRV_CHILD_DATA, true,
                                       &local_err);
        if (wanted && !s->data_file && !local_err) {
            s->data_file = fvd_open_named_data_file(bs, options, &local_err);
        }
    }
    if (!wanted) {
        if (s->data_file) {
            error_setg(errp, "'data-file' can only be set for images that have "
                       "a data file");
            return -EINVAL;
        }
        error_propagate(errp, local_err);
        return local_err ? -EINVAL : 0;
    }

    s->metadata_only = (flags & BDRV_O_CHECK) && !(flags & BDRV_O_RDWR);
    if (local_err && s->metadata_only) {
        /* The check will tell */
        warn_report_err(local_err);
    } else if (local_err) {
        error_propagate(errp, local_err);
        return -EINVAL;
    }

    bdrv_graph_rdlock_main_loop();
    bs->file->role &= ~BDRV_CHILD_DATA;
    /* Must succeed because we have given up permissions if anything */
    bdrv_child_refresh_perms(bs, bs->file, &error_abort);
    bdrv_graph_rdunlock_main_loop();
    return 0;
}

static int fvd_open(BlockDriverState *bs, QDict *options, int flags,
                    Error **errp)
{
    BDRVFvdState *s = bs->opaque;
    FVDSwap swap = { .bs = bs, .open = true, .errp = errp };
    BlockDriverState *data_bs;
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
    fvd_file_limits(bs->file->bs, &s->limits[FVD_FILE_IMAGE]);
    bdrv_graph_rdunlock_main_loop();

    /*
     * The header first: it says whether there is a data file.  If that is all
     * we want, another program may be writing: believe little.
     */
    swap.options = &s->options;
    swap.flags = FVD_OPEN_RDONLY | FVD_OPEN_NO_IO;
    ret = fvd_swap(&swap);
    if (ret < 0) {
        goto fail;
    }
    ret = fvd_open_data_file(bs, options, flags, errp);
    if (ret < 0) {
        goto fail;
    }

    bdrv_graph_rdlock_main_loop();
    data_bs = s->data_file ? s->data_file->bs : bs->file->bs;
    fvd_file_limits(data_bs, &s->limits[FVD_FILE_DATA]);
    bs->supported_zero_flags = BDRV_REQ_MAY_UNMAP |
        (data_bs->supported_zero_flags & BDRV_REQ_NO_FALLBACK);
    bdrv_graph_rdunlock_main_loop();

    /* FUA is not advertised: QEMU flushes instead, and that commits */
    bs->supported_write_flags = 0;
    bs->supported_truncate_flags = BDRV_REQ_ZERO_WRITE;

    if (flags & (BDRV_O_NO_IO | BDRV_O_INACTIVE)) {
        return 0;
    }
    swap.flags = fvd_open_flags(flags);
    ret = fvd_swap(&swap);
    if (ret == 0) {
        return 0;
    }
fail:
    if (s->data_file) {
        bdrv_graph_wrlock();
        bdrv_unref_child(bs, s->data_file);
        bdrv_graph_wrunlock();
        s->data_file = NULL;
    }
    fvd_space_close(bs);
    g_strfreev(s->options.space_helper);
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
    fvd_space_close(bs);
    g_strfreev(s->options.space_helper);
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
            r->options.metadata_memory != s->options.metadata_memory ||
            r->options.discard_no_unref != s->options.discard_no_unref ||
            r->options.space_wait != s->options.space_wait;
    }

    state->opaque = r;
    return 0;
fail:
    g_strfreev(r->options.space_helper);
    g_free(r);
    return ret;
}

static void fvd_reopen_commit(BDRVReopenState *state)
{
    BDRVFvdState *s = state->bs->opaque;
    FVDReopen *r = state->opaque;

    g_strfreev(s->options.space_helper);
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
    g_strfreev(r->options.space_helper);
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

/* The child that the library calls @file: of guest data, so not the base */
static BdrvChild *GRAPH_RDLOCK fvd_data_child(BlockDriverState *bs,
                                              uint32_t file)
{
    BDRVFvdState *s = bs->opaque;

    return file == FVD_FILE_DATA ? s->data_file : bs->file;
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
        if (map.len == bytes) {
            BdrvChild *child = fvd_data_child(bs, map.file);

            if (write) {
                BLKDBG_CO_EVENT(child, BLKDBG_WRITE_AIO);
                ret = bdrv_co_pwritev_part(child, map.offset, bytes, qiov,
                                           qiov_offset, 0);
            } else {
                BLKDBG_CO_EVENT(child, BLKDBG_READ_AIO);
                ret = bdrv_co_preadv_part(child, map.offset, bytes, qiov,
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

    if (st.place != FVD_PLACE_DATA && bs->backing) {
        /*
         * The rest of the block in which the base ends is in no image: who
         * changes the base must copy it, and qemu-img rebase wants it in one
         * piece.  Only if the base has grown since must the zeroes be ours.
         */
        int64_t base_length = bdrv_co_getlength(bs->backing->bs);
        int64_t end = offset + *pnum;

        if (base_length >= 0 && base_length <= end) {
            struct fvd_info info;

            fvd_get_info(bs->opaque, &info);
            if (info.block_size) {
                *pnum = MIN(ROUND_UP(end, (int64_t)info.block_size) - offset,
                            bytes);
            }
            if (base_length <= offset) {
                return 0;
            }
        }
    }

    switch (st.place) {
    case FVD_PLACE_BASE:
        return 0;
    case FVD_PLACE_ZERO:
        return BDRV_BLOCK_ZERO;
    default:
        *map = st.offset;
        *file = fvd_data_child(bs, st.file)->bs;
        return BDRV_BLOCK_DATA | BDRV_BLOCK_OFFSET_VALID | BDRV_BLOCK_RECURSE;
    }
}

static int64_t coroutine_fn fvd_co_getlength(BlockDriverState *bs)
{
    BDRVFvdState *s = bs->opaque;

    return qatomic_read_i64(&s->virtual_size);
}

/*
 * Writes zeroes: all of a range, or a sector in each chunk, which gives the
 * chunk its place
 */
static int coroutine_fn fvd_co_write_out(FVDEngine *e, int64_t from, int64_t to,
                                         uint32_t sector_in, Error **errp)
{
    size_t step = sector_in ? BDRV_SECTOR_SIZE : MIN(to - from, 2 * MiB);
    void *zeroes = qemu_memalign(qemu_real_host_page_size(), step);
    struct iovec iov;
    int ret = 0;

    memset(zeroes, 0, step);
    while (from < to && ret == 0) {
        FVDWait w = {};

        iov = (struct iovec) { zeroes, MIN(to - from, step) };
        fvd_submit_write(fvd_queue(e), from, &iov, 1, 0, fvd_done, &w);
        ret = fvd_co_wait(&w, errp);
        from = sector_in ? ROUND_UP(from + 1, (int64_t)sector_in)
                         : from + iov.iov_len;
    }
    qemu_vfree(zeroes);
    return ret;
}

/* Preallocates guest bytes that are new and read as zero */
static int coroutine_fn fvd_co_preallocate(FVDEngine *e, int64_t from,
                                           int64_t to, uint32_t chunk_size,
                                           PreallocMode prealloc, Error **errp)
{
    FVDWait w = {};
    int ret;

    if (prealloc == PREALLOC_MODE_FULL) {
        return fvd_co_write_out(e, from, to, 0, errp);
    }
    if (chunk_size) {
        ret = fvd_co_write_out(e, from, to, chunk_size, errp);
        if (ret < 0) {
            return ret;
        }
    }
    if (prealloc == PREALLOC_MODE_METADATA) {
        return 0;
    }
    fvd_submit_write_zeroes(fvd_queue(e), from, to - from, 0, fvd_done, &w);
    return fvd_co_wait(&w, errp);
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

    if (offset > old_size && prealloc != PREALLOC_MODE_OFF) {
        struct fvd_info info;

        fvd_get_info(s, &info);
        ret = fvd_co_preallocate(e, old_size, offset, info.chunk_size, prealloc,
                                 errp);
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

/* After a commit: in the main loop, with all writers away */
static int GRAPH_RDLOCK fvd_make_empty(BlockDriverState *bs)
{
    BDRVFvdState *s = bs->opaque;
    FVDEngine *e = qatomic_load_acquire(&s->engine);
    FVDWait w = {};

    GLOBAL_STATE_CODE();
    if (!e) {
        return -EIO;
    }
    fvd_submit_make_empty(fvd_queue(e), fvd_done, &w);
    AIO_WAIT_WHILE_UNLOCKED(NULL, !w.done);
    return fvd_wait_result(&w, NULL);
}

/* In the main loop */
static int GRAPH_RDLOCK
fvd_amend_options(BlockDriverState *bs, QemuOpts *opts,
                  BlockDriverAmendStatusCB *status_cb, void *cb_opaque,
                  bool force, Error **errp)
{
    BDRVFvdState *s = bs->opaque;
    FVDEngine *e = qatomic_load_acquire(&s->engine);
    struct fvd_amend amend = { .struct_size = sizeof(amend) };
    const char *base = qemu_opt_get(opts, BLOCK_OPT_BACKING_FILE);
    const char *base_format = qemu_opt_get(opts, BLOCK_OPT_BACKING_FMT);
    const struct {
        const char *name;
        uint32_t given;
        uint64_t *value;
    } sizes[] = {
        { FVD_OPT_STORAGE_GROW_UNIT, FVD_AMEND_STORAGE_GROW_UNIT,
          &amend.storage_grow_unit },
        { FVD_OPT_CHUNK_SIZE, FVD_AMEND_CHUNK_SIZE, &amend.chunk_size },
        { FVD_OPT_BLOCK_SIZE, FVD_AMEND_BLOCK_SIZE, &amend.block_size },
        { FVD_OPT_JOURNAL_SIZE, FVD_AMEND_JOURNAL_SIZE, &amend.journal_size },
    };
    struct fvd_info info;
    BlockBackend *blk;
    FVDWait w = {};
    int ret;

    GLOBAL_STATE_CODE();
    if (!e) {
        error_setg(errp, "The image is not open");
        return -EIO;
    }

    fvd_get_info(s, &info);
    if ((base && strcmp(base, info.base_name)) ||
        (base_format && strcmp(base_format, info.base_format))) {
        error_setg(errp, "Cannot amend the backing file");
        error_append_hint(errp, "You can use 'qemu-img rebase' instead.\n");
        return -ENOTSUP;
    }

    for (int i = 0; i < ARRAY_SIZE(sizes); i++) {
        if (qemu_opt_find(opts, sizes[i].name)) {
            amend.given |= sizes[i].given;
            *sizes[i].value = qemu_opt_get_size(opts, sizes[i].name, 0);
        }
    }
    if (qemu_opt_find(opts, FVD_OPT_COMPACT_IMAGE)) {
        amend.given |= FVD_AMEND_FLAGS;
        amend.flags = qemu_opt_get_bool(opts, FVD_OPT_COMPACT_IMAGE, false)
                      ? FVD_CREATE_COMPACT : 0;
    }
    fvd_submit_amend(fvd_queue(e), &amend, fvd_done, &w);
    AIO_WAIT_WHILE_UNLOCKED(NULL, !w.done);
    ret = fvd_wait_result(&w, errp);
    if (ret < 0 || !qemu_opt_find(opts, BLOCK_OPT_SIZE)) {
        return ret;
    }

    blk = blk_new_with_bs(bs, BLK_PERM_RESIZE, BLK_PERM_ALL, errp);
    if (!blk) {
        return -EPERM;
    }
    ret = blk_truncate(blk, qemu_opt_get_size(opts, BLOCK_OPT_SIZE, 0), true,
                       PREALLOC_MODE_OFF, 0, errp);
    blk_unref(blk);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
fvd_co_amend(BlockDriverState *bs, BlockdevAmendOptions *opts, bool force,
             Error **errp)
{
    BlockdevAmendOptionsFvd *o = &opts->u.fvd;
    FVDEngine *e = fvd_co_engine(bs);
    struct fvd_amend amend = {
        .struct_size = sizeof(amend),
        .given = o->has_storage_grow_unit ? FVD_AMEND_STORAGE_GROW_UNIT : 0,
        .storage_grow_unit = o->storage_grow_unit,
    };
    FVDWait w = {};

    if (!e) {
        error_setg(errp, "The image is not open");
        return -EIO;
    }
    fvd_submit_amend(fvd_queue(e), &amend, fvd_done, &w);
    return fvd_co_wait(&w, errp);
}

/* What storage is allocated by, or else what is copied from the base */
static uint32_t fvd_cluster_size(const struct fvd_info *info)
{
    return info->chunk_size ?: info->block_size ?: FVD_DEFAULT_CLUSTER_SIZE;
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
    uint32_t cluster;
    uint32_t flags = 0;
    Error *local_err = NULL;
    FVDWait w = {};
    int ret;

    if (!e) {
        return -EIO;
    }
    if (fix & BDRV_FIX_ERRORS) {
        flags = FVD_CHECK_REPAIR_ALL;
    } else if (fix & BDRV_FIX_LEAKS) {
        flags = FVD_CHECK_REPAIR_LEAKS;
    }
    fvd_submit_check(fvd_queue(e), &check, flags, fvd_check_finding,
                     fvd_done, &w);
    ret = fvd_co_wait(&w, &local_err);
    if (ret < 0) {
        error_report_err(local_err);
        result->check_errors++;
        return ret;
    }

    fvd_get_info(s, &info);
    cluster = fvd_cluster_size(&info);
    result->corruptions = MIN(check.corruptions, INT_MAX);
    result->corruptions_fixed = MIN(check.corruptions_fixed, INT_MAX);
    result->leaks = MIN(DIV_ROUND_UP(check.leaked, cluster), INT_MAX);
    result->leaks_fixed = MIN(DIV_ROUND_UP(check.leaked_fixed, cluster),
                              INT_MAX);
    result->image_end_offset = check.image_end;
    if (info.chunk_size) {
        result->bfi.total_clusters = check.chunks_total;
        result->bfi.allocated_clusters = check.chunks_allocated;
        result->bfi.fragmented_clusters = check.chunks_fragmented;
    } else {
        result->bfi.total_clusters = check.blocks_total;
        result->bfi.allocated_clusters = check.blocks_present;
    }
    return 0;
}

/* --- Information --------------------------------------------------------- */

static int fvd_probe_image(const uint8_t *buf, int buf_size,
                           const char *filename)
{
    /* Version 1, too, is ours: it gets an error that says what to do */
    return fvd_probe(buf, buf_size) > 0 ? 100 : 0;
}

/*
 * WRITE and RESIZE on the data file too, like on any child with metadata, while
 * the node is writable and active: the library gives storage back and opens
 * growth steps without a parent's asking.
 */
static void fvd_child_perm(BlockDriverState *bs, BdrvChild *c,
                           BdrvChildRole role, BlockReopenQueue *queue,
                           uint64_t perm, uint64_t shared,
                           uint64_t *nperm, uint64_t *nshared)
{
    if (role & BDRV_CHILD_DATA) {
        role |= BDRV_CHILD_METADATA;
    }
    bdrv_default_perms(bs, c, role, queue, perm, shared, nperm, nshared);
}

static void GRAPH_RDLOCK fvd_refresh_limits(BlockDriverState *bs, Error **errp)
{
    BDRVFvdState *s = bs->opaque;
    BdrvChild *data_file = s->data_file ?: bs->file;
    struct fvd_info info;

    fvd_get_info(bs->opaque, &info);

    /*
     * As the file's, but a disk is a multiple of 512 bytes long, and its last
     * sector must be reachable: the library or the file aligns the rest.
     */
    if (data_file) {
        bs->bl.request_alignment = MIN(data_file->bs->bl.request_alignment,
                                       BDRV_SECTOR_SIZE);
    }
    bs->bl.max_transfer = MIN_NON_ZERO(bs->bl.max_transfer, FVD_MAX_TRANSFER);
    /*
     * Of a compact image, too, not its chunk size: parts of chunks are zeroed
     * and discarded as well, and a chunk is whole blocks.
     */
    bs->bl.pwrite_zeroes_alignment = info.block_size;
    bs->bl.pdiscard_alignment = info.block_size;
}

/* A compact image has no storage for what was never written */
static bool fvd_reads_zero(const struct fvd_info *info)
{
    return info->chunk_size || !(info->flags & FVD_INFO_NON_ZEROING);
}

static int GRAPH_RDLOCK fvd_has_zero_init(BlockDriverState *bs)
{
    struct fvd_info info;

    fvd_get_info(bs->opaque, &info);
    return fvd_reads_zero(&info);
}

static int coroutine_fn GRAPH_RDLOCK
fvd_co_get_info(BlockDriverState *bs, BlockDriverInfo *bdi)
{
    BDRVFvdState *s = bs->opaque;
    FVDEngine *e = qatomic_load_acquire(&s->engine);
    struct fvd_info info;

    fvd_get_info(s, &info);
    bdi->cluster_size = fvd_cluster_size(&info);
    /* Copy-on-write is by block, whatever the chunks */
    bdi->subcluster_size = info.block_size ?: FVD_DEFAULT_CLUSTER_SIZE;
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
        .version                = info.version,
        .uuid                   = qemu_uuid_unparse_strdup(&uuid),
        .clean                  = info.flags & FVD_INFO_CLEAN,
        .zeroed                 = fvd_reads_zero(&info),
        .data_file              = info.data_name[0] ?
                                  g_strdup(info.data_name) : NULL,
        .data_offset            = info.data_offset,
        .journal_size           = info.journal_size,
        .has_chunk_size         = info.chunk_size,
        .chunk_size             = info.chunk_size,
        .has_storage_grow_unit  = info.chunk_size,
        .storage_grow_unit      = info.storage_grow_unit,
        .has_block_size         = info.block_size,
        .block_size             = info.block_size,
        .has_base_length        = info.flags & FVD_INFO_HAS_BASE_LENGTH,
        .base_length            = info.base_length,
        .has_covered_length     = info.block_size,
        .covered_length         = info.covered,
        .has_blocks_total       = info.block_size,
        .blocks_total           = info.blocks,
        .generation             = info.generation,
        .epoch                  = info.epoch,
    };
    return spec;
}

static BlockDriver bdrv_fvd = {
    .format_name                    = "fvd",
    .instance_size                  = sizeof(BDRVFvdState),
    .create_opts                    = &fvd_create_opts,
    .amend_opts                     = &fvd_amend_opts,
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
    .bdrv_child_perm                = fvd_child_perm,
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
    .bdrv_make_empty                = fvd_make_empty,
    .bdrv_amend_options             = fvd_amend_options,
    .bdrv_co_amend                  = fvd_co_amend,
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
