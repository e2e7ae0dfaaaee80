/*
 * FVD block driver: what its files share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_FVD_INT_H
#define BLOCK_FVD_INT_H

#include "block/block_int.h"
#include "qapi/qapi-types-block-core.h"
#include "qemu/queue.h"
#include "qemu/units.h"

#include <fvd.h>

#define FVD_OPT_BLOCK_SIZE          "block_size"
#define FVD_OPT_JOURNAL_SIZE        "journal_size"
#define FVD_OPT_DETECT_SPARSE_HOLE  "detect_sparse_hole"
#define FVD_OPT_COMPACT_IMAGE       "compact_image"
#define FVD_OPT_CHUNK_SIZE          "chunk_size"
#define FVD_OPT_STORAGE_GROW_UNIT   "storage_grow_unit"

#define FVD_OPT_SPACE_HELPER        "space-helper"
#define FVD_OPT_SPACE_WAIT          "space-wait"

/* An image to be measured is kept up to here: what opening without I/O reads */
#define FVD_MEASURE_HEAD            (256 * KiB)

typedef struct FVDEngine FVDEngine;
typedef struct FVDHelper FVDHelper;

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
    BlockBackend *data;         /* its data file, if it gets one, */
    BlockBackend *base;         /* its base, if that can be read, */
    uint8_t *measuring;         /* or nothing is written at all, but counted */
    uint64_t measured_end[2];   /* by FVD_FILE_IMAGE, FVD_FILE_DATA */

    struct fvd_image *image;    /* thread-safe */
    bool writable;
    bool space_wait;            /* writes wait for storage, if not drained */
    /* Where guest data begins in bs->file, if it does; set when opened */
    uint64_t data_offset;

    QemuMutex lock;             /* never held across a call of the library */
    bool paused;                /* drained: timers do not run; under @lock */
    QLIST_HEAD(, FVDQueue) queues;

    QSLIST_ENTRY(FVDEngine) retired;
};

typedef struct FVDOptions {
    uint64_t commit_interval_ms;
    uint64_t metadata_memory;
    bool discard_no_unref;
    bool space_wait;
    char **space_helper;        /* argv, owned; NULL: none */
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

    BdrvChild *data_file;       /* or NULL: guest data lies in bs->file */

    FVDOptions options;         /* main loop */
    FVDHelper *helper;          /* the helper that runs; main loop */
    int64_t helper_pause_until; /* ms of QEMU_CLOCK_REALTIME; main loop */
    struct fvd_limits limits[2]; /* by FVD_FILE_IMAGE, FVD_FILE_DATA; from open */
    bool metadata_only;         /* checked: do without a sound data file */
    struct fvd_info info;       /* when there was an engine last; main loop */
    int64_t virtual_size;       /* atomic */
} BDRVFvdState;

typedef struct FVDWait {
    Coroutine *co;              /* set while it sleeps */
    bool done;
    int64_t ret;
    char *text;
} FVDWait;

/* fvd-host.c: the library's host, its queues and engines */

void fvd_done(void *opaque, int64_t ret, const char *text);
int fvd_wait_result(FVDWait *w, Error **errp);
int coroutine_fn fvd_co_wait(FVDWait *w, Error **errp);

struct fvd_queue *fvd_queue(FVDEngine *e);
bool fvd_queue_destroy(FVDQueue *q);
FVDEngine *fvd_engine_new(BlockDriverState *bs, const FVDOptions *options,
                          const struct fvd_limits limits[2], uint32_t flags,
                          Error **errp);
void fvd_engine_destroy(FVDEngine *e);
void coroutine_fn fvd_co_engine_free(FVDEngine *e);
FVDEngine *coroutine_fn fvd_co_engine_open(BlockDriverState *bs,
                                           const FVDOptions *options,
                                           uint32_t flags, Error **errp);
void fvd_pause(FVDEngine *e, bool paused);
void GRAPH_RDLOCK fvd_file_limits(BlockDriverState *bs,
                                  struct fvd_limits *limits);

/* fvd-space.c */

int fvd_read_space_options(QDict *options, QemuOpts *opts, FVDOptions *out,
                           Error **errp);
void fvd_space_low(BlockDriverState *bs, uint64_t free, uint64_t wanted);
void fvd_space_close(BlockDriverState *bs);

/* fvd-create.c */

extern QemuOptsList fvd_create_opts;
extern QemuOptsList fvd_amend_opts;

int coroutine_fn GRAPH_UNLOCKED
fvd_co_create(BlockdevCreateOptions *opts, Error **errp);
int coroutine_fn GRAPH_UNLOCKED
fvd_co_create_opts(BlockDriver *drv, const char *filename, QemuOpts *opts,
                   Error **errp);
BlockMeasureInfo *fvd_measure(QemuOpts *opts, BlockDriverState *in_bs,
                              Error **errp);

#endif /* BLOCK_FVD_INT_H */
