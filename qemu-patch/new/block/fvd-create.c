/*
 * FVD block driver: creation and measuring
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include "block/aio-wait.h"
#include "block/qdict.h"
#include "qapi/error.h"
#include "qapi/qapi-visit-block-core.h"
#include "qapi/qobject-input-visitor.h"
#include "qemu/cutils.h"
#include "qemu/option.h"
#include "qobject/qdict.h"
#include "system/block-backend.h"

#include "fvd-int.h"

/* The name by which the image will know the node of its data file */
static char *fvd_data_file_name(BlockdevCreateOptionsFvd *o,
                                BlockDriverState *data_bs, Error **errp)
{
    if (o->data_file_name) {
        return g_strdup(o->data_file_name);
    }
    if (!data_bs->filename[0] || path_has_protocol(data_bs->filename)) {
        error_setg(errp, "Node '%s' has no plain file name: the image needs "
                   "data-file-name", bdrv_get_node_name(data_bs));
        return NULL;
    }
    /* Names in an image are relative to its directory, not to ours */
    return g_canonicalize_filename(data_bs->filename, NULL);
}

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

int coroutine_fn GRAPH_UNLOCKED
fvd_co_create(BlockdevCreateOptions *opts, Error **errp)
{
    BlockdevCreateOptionsFvd *o = &opts->u.fvd;
    const char *base_format = NULL;
    BlockDriverState *bs = NULL;
    BlockDriverState *data_bs = NULL;
    BlockBackend *blk = NULL, *base = NULL, *data = NULL;
    g_autofree char *data_name = NULL;
    struct fvd_limits limits[2];
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

    if (o->chunk_size > UINT32_MAX) {
        error_setg(errp, "chunk-size %" PRIu64 " is too large", o->chunk_size);
        return -EINVAL;
    }

    if (o->data_file_name && (!o->data_file || !*o->data_file_name)) {
        error_setg(errp, "data-file-name '%s' is %s", o->data_file_name,
                   o->data_file ? "empty" : "given without data-file");
        return -EINVAL;
    }

    bs = bdrv_co_open_blockdev_ref(o->file, errp);
    if (!bs) {
        return -EIO;
    }
    if (o->data_file) {
        data_bs = bdrv_co_open_blockdev_ref(o->data_file, errp);
        if (!data_bs) {
            ret = -EIO;
            goto out;
        }
        if (data_bs == bs) {
            error_setg(errp, "data-file and file are the same node '%s'",
                       bdrv_get_node_name(bs));
            goto out;
        }
        data_name = fvd_data_file_name(o, data_bs, errp);
        if (!data_name) {
            goto out;
        }
        data = blk_co_new_with_bs(data_bs, BLK_PERM_WRITE | BLK_PERM_RESIZE,
                                  BLK_PERM_ALL, errp);
        if (!data) {
            ret = -EPERM;
            goto out;
        }
        blk_set_allow_write_beyond_eof(data, true);
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

    if (data) {
        ret = blk_co_truncate(data, 0, false, PREALLOC_MODE_OFF, 0, errp);
        if (ret < 0) {
            goto out;
        }
    }

    bdrv_graph_co_rdlock();
    fvd_file_limits(bs, &limits[FVD_FILE_IMAGE]);
    fvd_file_limits(data_bs ?: bs, &limits[FVD_FILE_DATA]);
    bdrv_graph_co_rdunlock();
    e = fvd_engine_new(NULL, &options, limits, 0, errp);
    if (!e) {
        ret = -EINVAL;
        goto out;
    }
    e->file = blk;
    e->data = data;
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
        .flags = o->compact_image ? FVD_CREATE_COMPACT : 0,
        .chunk_size = o->chunk_size,
        .storage_grow_unit = o->storage_grow_unit,
        .data_name = data_name,
        .data_format = data_name ? "raw" : NULL,
    }, fvd_done, &w);
    ret = fvd_co_wait(&w, errp);
    fvd_co_engine_free(e);
out:
    blk_co_unref(base);
    blk_co_unref(data);
    blk_co_unref(blk);
    bdrv_co_unref(data_bs);
    bdrv_co_unref(bs);
    return ret;
}

QemuOptsList fvd_create_opts = {
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
            .help = "Another name for chunk_size of a compact image, else for "
                    "block_size"
        },
        {
            .name = FVD_OPT_COMPACT_IMAGE,
            .type = QEMU_OPT_BOOL,
            .help = "Allocate storage when it is written, a chunk at a time "
                    "(default: off)"
        },
        {
            .name = FVD_OPT_CHUNK_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Allocation unit of a compact image in bytes, a power of "
                    "two from 64k to 64M (default: 1M)"
        },
        {
            .name = FVD_OPT_STORAGE_GROW_UNIT,
            .type = QEMU_OPT_SIZE,
            .help = "Steps by which the file of a compact image grows, in "
                    "bytes, a multiple of chunk_size (default: 64M)"
        },
        {
            .name = FVD_OPT_JOURNAL_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Journal size in bytes, 1M to 256M (default: 16M)"
        },
        {
            .name = BLOCK_OPT_DATA_FILE,
            .type = QEMU_OPT_STRING,
            .help = "File name of a data file: the disk's content lies there, "
                    "as in a raw image"
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

/* What cannot change is accepted with the value that the image has */
QemuOptsList fvd_amend_opts = {
    .name = "fvd-amend-opts",
    .head = QTAILQ_HEAD_INITIALIZER(fvd_amend_opts.head),
    .desc = {
        {
            .name = BLOCK_OPT_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Virtual disk size"
        },
        {
            .name = BLOCK_OPT_BACKING_FILE,
            .type = QEMU_OPT_STRING,
            .help = "File name of the base image (changed by rebase only)"
        },
        {
            .name = BLOCK_OPT_BACKING_FMT,
            .type = QEMU_OPT_STRING,
            .help = "Image format of the base image (changed by rebase only)"
        },
        {
            .name = FVD_OPT_STORAGE_GROW_UNIT,
            .type = QEMU_OPT_SIZE,
            .help = "Steps by which the file of a compact image grows, in "
                    "bytes, a multiple of chunk_size"
        },
        {
            .name = FVD_OPT_BLOCK_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Copy-on-write unit in bytes (cannot change)"
        },
        {
            .name = FVD_OPT_COMPACT_IMAGE,
            .type = QEMU_OPT_BOOL,
            .help = "Storage is allocated when it is written (cannot change)"
        },
        {
            .name = FVD_OPT_CHUNK_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Allocation unit of a compact image in bytes (cannot "
                    "change)"
        },
        {
            .name = FVD_OPT_JOURNAL_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Journal size in bytes (cannot change)"
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

/* What cluster_size is another name for */
static const char *fvd_cluster_alias(QemuOpts *opts)
{
    return qemu_opt_get_bool(opts, FVD_OPT_COMPACT_IMAGE, false)
           ? FVD_OPT_CHUNK_SIZE : FVD_OPT_BLOCK_SIZE;
}

int coroutine_fn GRAPH_UNLOCKED
fvd_co_create_opts(BlockDriver *drv, const char *filename, QemuOpts *opts,
                   Error **errp)
{
    static const QDictRenames renames[] = {
        { BLOCK_OPT_BACKING_FILE,       "backing-file" },
        { BLOCK_OPT_BACKING_FMT,        "backing-fmt" },
        { FVD_OPT_BLOCK_SIZE,           "block-size" },
        { FVD_OPT_JOURNAL_SIZE,         "journal-size" },
        { FVD_OPT_DETECT_SPARSE_HOLE,   "detect-sparse-hole" },
        { FVD_OPT_COMPACT_IMAGE,        "compact-image" },
        { FVD_OPT_CHUNK_SIZE,           "chunk-size" },
        { FVD_OPT_STORAGE_GROW_UNIT,    "storage-grow-unit" },
        { NULL, NULL },
    };
    BlockdevCreateOptions *create_options = NULL;
    BlockDriverState *bs = NULL, *data_bs = NULL;
    const char *unit, *unit_name, *alias, *hole;
    g_autofree char *data_name = NULL, *data_full = NULL;
    QDict *qdict;
    Visitor *v;
    int ret = -EINVAL;

    unit_name = fvd_cluster_alias(opts);
    qdict = qemu_opts_to_qdict_filtered(opts, NULL, &fvd_create_opts, true);

    unit = qdict_get_try_str(qdict, unit_name);
    alias = qdict_get_try_str(qdict, BLOCK_OPT_CLUSTER_SIZE);
    if (alias && unit && strcmp(alias, unit)) {
        error_setg(errp, "%s %s and %s %s are the same option with different "
                   "values", BLOCK_OPT_CLUSTER_SIZE, alias, unit_name, unit);
        goto out;
    }
    if (alias) {
        g_autofree char *value = g_strdup(alias);

        qdict_del(qdict, BLOCK_OPT_CLUSTER_SIZE);
        qdict_put_str(qdict, unit_name, value);
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
    data_name = g_strdup(qdict_get_try_str(qdict, BLOCK_OPT_DATA_FILE));
    qdict_del(qdict, BLOCK_OPT_DATA_FILE);
    if (data_name) {
        /* As it will be found: relative to the image */
        data_full = path_is_absolute(data_name)
                    ? g_strdup(data_name) : path_combine(filename, data_name);
        if (!strcmp(data_full, filename)) {
            error_setg(errp, "data_file '%s' is the image itself", data_name);
            goto out;
        }
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

    if (data_name) {
        ret = bdrv_co_create_file(data_full, opts, errp);
        if (ret < 0) {
            goto out;
        }
        data_bs = bdrv_co_open(data_full, NULL, NULL,
                               BDRV_O_RDWR | BDRV_O_RESIZE | BDRV_O_PROTOCOL,
                               errp);
        if (!data_bs) {
            ret = -EIO;
            goto out;
        }
        qdict_put_str(qdict, "data-file", data_bs->node_name);
        qdict_put_str(qdict, "data-file-name", data_name);
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
        bdrv_co_delete_file_noerr(data_bs);
        bdrv_graph_co_rdunlock();
    }
    qobject_unref(qdict);
    bdrv_co_unref(data_bs);
    bdrv_co_unref(bs);
    qapi_free_BlockdevCreateOptions(create_options);
    return ret;
}

/*
 * Bytes of the chunks that hold data of @in_bs.  With a base it is not known
 * what of that stays there: then, and without @in_bs, all of them.
 */
static int64_t fvd_measure_chunks(BlockDriverState *in_bs, bool has_base,
                                  int64_t size, int64_t chunk_size,
                                  Error **errp)
{
    int64_t offset, pnum, counted_to = 0, bytes = 0;

    if (has_base) {
        return ROUND_UP(size, chunk_size);
    }
    for (offset = 0; in_bs && offset < size; offset += pnum) {
        int ret = bdrv_block_status_above(in_bs, NULL, offset, size - offset,
                                          &pnum, NULL, NULL);

        if (ret < 0) {
            error_setg_errno(errp, -ret, "Unable to get block status");
            return ret;
        }
        if (!pnum) {
            break; /* the end of an image that is no multiple of 512 long */
        }
        if (!(ret & BDRV_BLOCK_ZERO) && (ret & BDRV_BLOCK_ALLOCATED)) {
            int64_t start = MAX(ROUND_DOWN(offset, chunk_size), counted_to);

            counted_to = ROUND_UP(offset + pnum, chunk_size);
            bytes += counted_to - start;
        }
    }
    return bytes;
}

static void fvd_measure_done(FVDEngine *e)
{
    AIO_WAIT_WHILE_UNLOCKED(NULL, !fvd_queue_destroy(QLIST_FIRST(&e->queues)));
    fvd_engine_destroy(e);
}

/*
 * Has the library create an image nowhere.  Returns the length of its files, and
 * in @info what a look into the image would say.
 */
static int64_t fvd_measure_image(const struct fvd_create *params,
                                 struct fvd_info *info, Error **errp)
{
    struct fvd_limits limit = {
        .struct_size = sizeof(limit),
        .flags = FVD_LIMIT_GROWS_ZEROED | FVD_LIMIT_CHEAP_ZEROING,
    };
    struct fvd_limits limits[2] = { limit, limit };
    uint64_t ends[2];
    FVDOptions options = {};
    g_autofree uint8_t *head = NULL;
    FVDEngine *e;
    FVDWait w = {};
    int ret;

    e = fvd_engine_new(NULL, &options, limits, 0, errp);
    if (!e) {
        return -EINVAL;
    }
    e->measuring = g_malloc0(FVD_MEASURE_HEAD);
    fvd_submit_create(fvd_queue(e), params, fvd_done, &w);
    AIO_WAIT_WHILE_UNLOCKED(NULL, !w.done);
    ret = fvd_wait_result(&w, errp);
    memcpy(ends, e->measured_end, sizeof(ends));
    head = g_steal_pointer(&e->measuring);
    fvd_measure_done(e);
    if (ret < 0) {
        return ret;
    }

    e = fvd_engine_new(NULL, &options, limits,
                       FVD_OPEN_RDONLY | FVD_OPEN_NO_IO, errp);
    if (!e) {
        return -EINVAL;
    }
    e->measuring = g_steal_pointer(&head);
    memcpy(e->measured_end, ends, sizeof(ends));
    w = (FVDWait) {};
    fvd_submit_open(fvd_queue(e), fvd_done, &w);
    AIO_WAIT_WHILE_UNLOCKED(NULL, !w.done);
    ret = fvd_wait_result(&w, errp);
    if (ret == 0 && fvd_image_info(e->image, info) < 0) {
        error_setg(errp, "%s", fvd_error());
        ret = -EIO;
    }
    fvd_measure_done(e);
    return ret < 0 ? ret : ends[FVD_FILE_IMAGE] + ends[FVD_FILE_DATA];
}

BlockMeasureInfo *fvd_measure(QemuOpts *opts, BlockDriverState *in_bs,
                              Error **errp)
{
    g_autofree char *backing_file = NULL;
    g_autofree char *data_file = NULL;
    g_autofree char *preallocation = NULL;
    struct fvd_create params = { .struct_size = sizeof(params) };
    struct fvd_info image = { .struct_size = sizeof(image) };
    bool compact = qemu_opt_get_bool_del(opts, FVD_OPT_COMPACT_IMAGE, false);
    BlockMeasureInfo *info = NULL;
    Error *local_err = NULL;
    PreallocMode prealloc;
    uint64_t cluster_size, block_size, chunk_size;
    int64_t size, length, used, most;

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
    cluster_size = qemu_opt_get_size_del(opts, BLOCK_OPT_CLUSTER_SIZE, 0);
    block_size = qemu_opt_get_size_del(opts, FVD_OPT_BLOCK_SIZE,
                                       compact ? 0 : cluster_size);
    chunk_size = qemu_opt_get_size_del(opts, FVD_OPT_CHUNK_SIZE,
                                       compact ? cluster_size : 0);
    params.block_size = MIN(block_size, UINT32_MAX);
    params.chunk_size = MIN(chunk_size, UINT32_MAX);
    params.storage_grow_unit =
        qemu_opt_get_size_del(opts, FVD_OPT_STORAGE_GROW_UNIT, 0);
    params.journal_size = qemu_opt_get_size_del(opts, FVD_OPT_JOURNAL_SIZE, 0);
    params.flags = compact ? FVD_CREATE_COMPACT : 0;
    preallocation = qemu_opt_get_del(opts, BLOCK_OPT_PREALLOC);
    prealloc = qapi_enum_parse(&PreallocMode_lookup, preallocation,
                               PREALLOC_MODE_OFF, &local_err);
    if (local_err) {
        error_propagate(errp, local_err);
        return NULL;
    }
    if (prealloc != PREALLOC_MODE_OFF) {
        params.preallocation = FVD_PREALLOC_METADATA; /* the same length */
    }
    backing_file = qemu_opt_get_del(opts, BLOCK_OPT_BACKING_FILE);
    if (backing_file) {
        params.base_name = backing_file;
        params.base_format = "raw"; /* as good as any other here */
    }

    data_file = qemu_opt_get_del(opts, BLOCK_OPT_DATA_FILE);
    if (data_file) {
        params.data_name = data_file;
        params.data_format = "raw";
    }

    length = fvd_measure_image(&params, &image, errp);
    if (length < 0) {
        return NULL;
    }
    /* A flat image is as long from the start as it can get */
    used = most = length;

    if (compact && !params.preallocation) {
        /* The file grows by whole steps */
        used = fvd_measure_chunks(in_bs, backing_file, size, image.chunk_size,
                                  errp);
        if (used < 0) {
            return NULL;
        }
        used = length + QEMU_ALIGN_UP(used, image.storage_grow_unit);
        most = length + QEMU_ALIGN_UP(image.chunks * image.chunk_size,
                                      image.storage_grow_unit);
    }

    info = g_new0(BlockMeasureInfo, 1);
    info->required = used;
    info->fully_allocated = most;
    return info;
}
