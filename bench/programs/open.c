/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Opens and closes an image COUNT times in this process and prints what each
 * open took.
 *
 *   open IMAGE COUNT base|nobase rw|ro
 */
#include <fvd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
    struct fvd_info info = { .struct_size = sizeof(info) };
    struct fvd_file_options options = { .struct_size = sizeof(options), .flags = FVD_FILE_DIRECT };

    if (argc != 5) {
        fprintf(stderr, "usage: open IMAGE COUNT base|nobase rw|ro\n");
        return 2;
    }
    int count = atoi(argv[2]);
    if (strcmp(argv[3], "base") == 0) {
        options.flags |= FVD_FILE_ALLOW_BASE;
    }
    if (strcmp(argv[4], "ro") == 0) {
        options.flags |= FVD_OPEN_RDONLY;
    }
    printf("{\"ms\": [");
    for (int i = 0; i < count; i++) {
        struct fvd_file *file;
        double start = now();
        if (fvd_file_open(argv[1], &options, &file) < 0) {
            fprintf(stderr, "%s: %s\n", argv[1], fvd_error());
            return 1;
        }
        printf("%s%.4f", i ? ", " : "", (now() - start) * 1000);
        if (fvd_image_info(fvd_file_image(file), &info) < 0 || fvd_file_close(&file) < 0) {
            fprintf(stderr, "%s: %s\n", argv[1], fvd_error());
            return 1;
        }
    }
    printf("], \"virtual_size\": %llu, \"metadata_bytes\": %llu, \"journal_size\": %llu, \"block_size\": %u}\n",
           (unsigned long long)info.virtual_size, (unsigned long long)info.metadata_bytes,
           (unsigned long long)info.journal_size, info.block_size);
    return 0;
}
