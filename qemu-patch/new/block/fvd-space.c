/*
 * FVD block driver: storage that runs low - the event, the helper program
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include "block/block-io.h"
#include "block/qdict.h"
#include "qapi/error.h"
#include "qapi/qapi-events-block-core.h"
#include "qobject/qdict.h"
#include "qobject/qlist.h"
#include "qobject/qstring.h"
#include "qemu/config-file.h"
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "qemu/main-loop.h"
#include "qemu/option.h"
#include "qemu/thread.h"

#include "fvd-int.h"

/* A helper that failed is not run again at once, however much is written */
#define FVD_HELPER_PAUSE_MS         10000

/* A run of the helper program; in the main loop but for its thread */
struct FVDHelper {
    BlockDriverState *bs;       /* NULL: closed meanwhile */
    char **argv;
    int ret;                    /* 0, or -1 with */
    char *error;
};

/* --- The option ---------------------------------------------------------- */

static int fvd_denies_spawn(void *opaque, QemuOpts *opts, Error **errp)
{
    const char *spawn = qemu_opt_get(opts, "spawn");

    return qemu_opt_get_bool(opts, "enable", false) && spawn &&
           !strcmp(spawn, "deny");
}

/* A program that -sandbox does not let us start would kill us instead */
static bool fvd_may_spawn(void)
{
    QemuOptsList *list = qemu_find_opts_err("sandbox", NULL);

    return !list || !qemu_opts_foreach(list, fvd_denies_spawn, NULL, NULL);
}

/* Takes "space-helper.N" out of @options: a NULL-terminated argv, or NULL */
static int fvd_read_argv(QDict *options, char ***argv, Error **errp)
{
    g_autoptr(QDict) sub = NULL;
    g_autoptr(QList) list = NULL;
    g_autoptr(GPtrArray) words = g_ptr_array_new_with_free_func(g_free);
    QObject *crumpled;
    QListEntry *entry;

    *argv = NULL;
    if (qdict_haskey(options, FVD_OPT_SPACE_HELPER)) {
        error_setg(errp, FVD_OPT_SPACE_HELPER " is a list: "
                   FVD_OPT_SPACE_HELPER ".0 is the program, "
                   FVD_OPT_SPACE_HELPER ".1 its first argument");
        return -EINVAL;
    }
    qdict_extract_subqdict(options, &sub, FVD_OPT_SPACE_HELPER ".");
    if (!qdict_size(sub)) {
        return 0;
    }
    crumpled = qdict_crumple(sub, errp);
    if (!crumpled) {
        return -EINVAL;
    }
    list = qobject_to(QList, crumpled);
    if (!list) {
        qobject_unref(crumpled);
        error_setg(errp, FVD_OPT_SPACE_HELPER " is not a list of words");
        return -EINVAL;
    }
    QLIST_FOREACH_ENTRY(list, entry) {
        QString *word = qobject_to(QString, qlist_entry_obj(entry));

        if (!word) {
            error_setg(errp, FVD_OPT_SPACE_HELPER " is not a list of words");
            return -EINVAL;
        }
        g_ptr_array_add(words, g_strdup(qstring_get_str(word)));
    }
    if (*(char *)g_ptr_array_index(words, 0) != '/') {
        error_setg(errp, FVD_OPT_SPACE_HELPER ": '%s' is no absolute path",
                   (char *)g_ptr_array_index(words, 0));
        return -EINVAL;
    }
    g_ptr_array_add(words, NULL);
    *argv = (char **)g_ptr_array_free(g_steal_pointer(&words), false);
    return 0;
}

int fvd_read_space_options(QDict *options, QemuOpts *opts, FVDOptions *out,
                           Error **errp)
{
    int ret = fvd_read_argv(options, &out->space_helper, errp);

    if (ret < 0) {
        return ret;
    }
    out->space_wait = qemu_opt_get_bool(opts, FVD_OPT_SPACE_WAIT,
                                        out->space_helper);
    if (out->space_helper && !fvd_may_spawn()) {
        error_setg(errp, FVD_OPT_SPACE_HELPER " needs to start a program, and "
                   "-sandbox spawn=deny forbids that");
        ret = -EPERM;
    } else if (out->space_wait && !out->space_helper) {
        error_setg(errp, FVD_OPT_SPACE_WAIT " needs " FVD_OPT_SPACE_HELPER
                   ": nothing else could end the wait");
        ret = -EINVAL;
    }
    if (ret < 0) {
        g_clear_pointer(&out->space_helper, g_strfreev);
    }
    return ret;
}

/* --- Running the helper -------------------------------------------------- */

static void fvd_helper_free(FVDHelper *helper)
{
    g_strfreev(helper->argv);
    g_free(helper->error);
    g_free(helper);
}

/* Writes that wait for storage go on, or fail */
static void fvd_space_answer(BDRVFvdState *s, int ret)
{
    QEMU_LOCK_GUARD(&s->lock);
    if (s->engine) {
        fvd_image_space_changed(s->engine->image, ret);
    }
}

static void fvd_helper_done_bh(void *opaque)
{
    FVDHelper *helper = opaque;
    BDRVFvdState *s;

    if (helper->bs) {
        s = helper->bs->opaque;
        s->helper = NULL;
        if (helper->ret < 0) {
            s->helper_pause_until = qemu_clock_get_ms(QEMU_CLOCK_REALTIME) +
                                    FVD_HELPER_PAUSE_MS;
            warn_report("fvd: %s: " FVD_OPT_SPACE_HELPER " '%s': %s",
                        bdrv_get_node_name(helper->bs), helper->argv[0],
                        helper->error);
        }
        fvd_space_answer(s, helper->ret);
    }
    fvd_helper_free(helper);
}

/* QEMU's threads block all signals, and a program would inherit that */
static void fvd_helper_setup(gpointer opaque)
{
    sigset_t none;

    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

/*
 * A thread, as not every program of ours runs a GLib main loop, and none does
 * while it polls for one request.
 */
static void *fvd_helper_thread(void *opaque)
{
    FVDHelper *helper = opaque;
    GError *error = NULL;
    int status = 0;

    if (!g_spawn_sync(NULL, helper->argv, NULL,
                      G_SPAWN_STDOUT_TO_DEV_NULL, fvd_helper_setup, NULL,
                      NULL, NULL, &status, &error) ||
        !g_spawn_check_wait_status(status, &error)) {
        helper->ret = -1;
        helper->error = g_strdup(error->message);
        g_error_free(error);
    }
    aio_bh_schedule_oneshot(qemu_get_aio_context(), fvd_helper_done_bh,
                            helper);
    return NULL;
}

static void fvd_helper_start(BlockDriverState *bs, uint64_t free,
                             uint64_t wanted)
{
    BDRVFvdState *s = bs->opaque;
    FVDHelper *helper = g_new0(FVDHelper, 1);
    guint words = g_strv_length(s->options.space_helper);
    QemuThread thread;
    guint i;

    helper->bs = bs;
    helper->argv = g_new0(char *, words + 4);
    for (i = 0; i < words; i++) {
        helper->argv[i] = g_strdup(s->options.space_helper[i]);
    }
    helper->argv[words] = g_strdup((s->data_file ?: bs->file)->bs->filename);
    helper->argv[words + 1] = g_strdup_printf("%" PRIu64, free);
    helper->argv[words + 2] = g_strdup_printf("%" PRIu64, wanted);

    s->helper = helper;
    qemu_thread_create(&thread, "fvd-helper", fvd_helper_thread, helper,
                       QEMU_THREAD_DETACHED);
}

/* A helper that runs is left alone: what it does is done, and harms nobody */
void fvd_space_close(BlockDriverState *bs)
{
    BDRVFvdState *s = bs->opaque;

    GLOBAL_STATE_CODE();
    if (s->helper) {
        s->helper->bs = NULL;
        s->helper = NULL;
    }
}

/* --- What the library says ----------------------------------------------- */

typedef struct FVDSpaceLow {
    BlockDriverState *bs;
    uint64_t free;
    uint64_t wanted;
} FVDSpaceLow;

static void fvd_space_low_bh(void *opaque)
{
    FVDSpaceLow *low = opaque;
    BlockDriverState *bs = low->bs;
    BDRVFvdState *s = bs->opaque;

    qapi_event_send_block_space_low(bdrv_get_node_name(bs), low->free,
                                    low->wanted);
    if (!s->options.space_helper || s->helper) {
        /* Nobody to ask, or asked already */
    } else if (qemu_clock_get_ms(QEMU_CLOCK_REALTIME) <
               s->helper_pause_until) {
        fvd_space_answer(s, -ENOSPC);
    } else {
        GRAPH_RDLOCK_GUARD_MAINLOOP();
        fvd_helper_start(bs, low->free, low->wanted);
    }
    bdrv_dec_in_flight(bs);
    g_free(low);
}

/* From the thread of any queue */
void fvd_space_low(BlockDriverState *bs, uint64_t free, uint64_t wanted)
{
    FVDSpaceLow *low = g_new(FVDSpaceLow, 1);

    *low = (FVDSpaceLow) { .bs = bs, .free = free, .wanted = wanted };
    bdrv_inc_in_flight(bs);
    aio_bh_schedule_oneshot(qemu_get_aio_context(), fvd_space_low_bh, low);
}
