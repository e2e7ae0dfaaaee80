/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What a pass-through request asks of the engine: fvd_lookup + fvd_end, COUNT
 * times. Run natively it counts heap allocations; under callgrind with
 * --toggle-collect of the two functions only they are counted.
 *
 * Request n is at OFFSET + n * STEP mod SPAN.
 *
 *   lookup IMAGE COUNT OFFSET SPAN LENGTH STEP read|write data|ask
 */
#include <fvd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Interposed for the whole process, the library too. */
extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

static unsigned long allocations;

void *malloc(size_t n)
{
    allocations++;
    return __libc_malloc(n);
}

void *calloc(size_t n, size_t size)
{
    allocations++;
    return __libc_calloc(n, size);
}

void *realloc(void *p, size_t n)
{
    allocations++;
    return __libc_realloc(p, n);
}

void *aligned_alloc(size_t align, size_t n)
{
    allocations++;
    return __libc_memalign(align, n);
}

int posix_memalign(void **p, size_t align, size_t n)
{
    allocations++;
    *p = __libc_memalign(align, n);
    return *p ? 0 : 12; /* ENOMEM */
}

int main(int argc, char **argv)
{
    struct fvd_file_options options = {
        .struct_size = sizeof(options),
        .flags = FVD_FILE_ALLOW_BASE,
    };
    struct fvd_file *file;

    if (argc != 9) {
        fprintf(stderr, "usage: lookup IMAGE COUNT OFFSET SPAN LENGTH STEP read|write data|ask\n");
        return 2;
    }
    unsigned long count = strtoul(argv[2], NULL, 0);
    uint64_t from = strtoull(argv[3], NULL, 0), span = strtoull(argv[4], NULL, 0);
    uint64_t len = strtoull(argv[5], NULL, 0), step = strtoull(argv[6], NULL, 0);
    uint32_t flags = strcmp(argv[7], "write") == 0 ? FVD_LOOKUP_WRITE : 0;
    int expect = strcmp(argv[8], "data") == 0 ? FVD_LOOKUP_DATA : FVD_LOOKUP_ASK;

    if (fvd_file_open(argv[1], &options, &file) < 0) {
        fprintf(stderr, "%s: %s\n", argv[1], fvd_error());
        return 1;
    }
    unsigned long opening = allocations;
    struct fvd_image *image = fvd_file_image(file);
    /* A page of the bitmap (127 MiB at 4 KiB blocks) is loaded by the first request that needs it. */
    void *buf = malloc(len);
    for (uint64_t at = 0; at + len <= span; at += 1 << 20) {
        if (fvd_file_pread(file, buf, len, from + at) < 0) {
            fprintf(stderr, "read: %s\n", fvd_error());
            return 1;
        }
    }
    unsigned long before = allocations, wrong = 0;
    uint64_t at = 0;
    for (unsigned long i = 0; i < count; i++) {
        struct fvd_mapping map;
        int ret = fvd_lookup(image, 1, from + at, len, flags, &map);
        if (ret == FVD_LOOKUP_DATA) {
            wrong += map.len != len;
            fvd_end(image, map.token);
        }
        wrong += ret != expect;
        at = (at + step) % span;
    }
    unsigned long during = allocations - before;
    free(buf);
    printf("{\"lookups\": %lu, \"wrong\": %lu, \"allocations\": %lu, \"allocations_at_open\": %lu}\n", count,
           wrong, during, opening);
    return fvd_file_close(&file) < 0 || wrong != 0;
}
