/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Zeroes, discards and where things are. */
#include "util.h"

/* API-40 */
static void zeroes(enum mode mode, uint32_t flags)
{
    struct disk d;
    disk_start(&d, mode, 2 * MIB, MIB);
    CHECK_EQ(do_fill(&d.q, 9, 64 * KIB, 32 * KIB), 0);
    /* Over data, over the base, over its end, at odd offsets. */
    CHECK_EQ(do_write_zeroes(&d.q, 40 * KIB, 8 * KIB, flags), 0);
    CHECK_EQ(do_write_zeroes(&d.q, 200 * KIB + 100, 10000, flags), 0);
    CHECK_EQ(do_write_zeroes(&d.q, MIB - 5000, 10000, flags), 0);
    CHECK_EQ(do_write_zeroes(&d.q, 0, 0, flags), 0);
    check_base(&d.q, 32 * KIB, 0);
    check_bytes(&d.q, 9, 8 * KIB, 32 * KIB);
    check_bytes(&d.q, 0, 8 * KIB, 40 * KIB);
    check_bytes(&d.q, 9, 48 * KIB, 48 * KIB);
    check_base(&d.q, 4 * KIB, 196 * KIB);
    check_base(&d.q, 100, 200 * KIB);
    check_bytes(&d.q, 0, 10000, 200 * KIB + 100);
    check_base(&d.q, 2000, 200 * KIB + 10100);
    check_bytes(&d.q, 0, MIB, MIB - 5000);
    CHECK_EQ(do_flush(&d.q), 0);
    disk_crash_and_reopen(&d);
    check_bytes(&d.q, 0, 8 * KIB, 40 * KIB);
    check_bytes(&d.q, 0, 10000, 200 * KIB + 100);
    disk_end(&d);
}

/* API-41 */
static void discards(enum mode mode)
{
    struct disk d;
    uint8_t buf[8192];
    disk_start(&d, mode, 2 * MIB, MIB);
    CHECK_EQ(do_fill(&d.q, 9, 64 * KIB, 0), 0);
    CHECK_EQ(do_discard(&d.q, 16 * KIB, 8 * KIB), 0);
    CHECK_EQ(do_discard(&d.q, 32 * KIB + 7, 5000), 0);
    CHECK_EQ(do_discard(&d.q, 0, 0), 0);
    check_bytes(&d.q, 9, 16 * KIB, 0);
    CHECK_EQ(do_read(&d.q, buf, 8192, 16 * KIB), 0);
    for (int i = 0; i < 8192; i++) {
        CHECK(buf[i] == 0 || buf[i] == 9);
    }
    check_bytes(&d.q, 9, 7, 32 * KIB);
    CHECK_EQ(do_read(&d.q, buf, 5000, 32 * KIB + 7), 0);
    for (int i = 0; i < 5000; i++) {
        CHECK(buf[i] == 0 || buf[i] == 9);
    }
    /* Never the base again: that would be data the guest had overwritten. */
    CHECK_EQ(do_flush(&d.q), 0);
    disk_crash_and_reopen(&d);
    CHECK_EQ(do_read(&d.q, buf, 8192, 16 * KIB), 0);
    for (int i = 0; i < 8192; i++) {
        CHECK(buf[i] == 0 || buf[i] == 9);
    }
    disk_end(&d);
}

/* API-42: the answers agree with what is read, and cover the disk. */
static void block_status(enum mode mode)
{
    struct disk d;
    struct fvd_block_status status;
    uint64_t at = 0;
    unsigned seen[3] = { 0 };
    disk_start(&d, mode, 2 * MIB, MIB);
    CHECK_EQ(do_fill(&d.q, 9, 64 * KIB, 32 * KIB), 0);
    CHECK_EQ(do_write_zeroes(&d.q, 512 * KIB, 64 * KIB, 0), 0);
    while (at < 2 * MIB) {
        CHECK_EQ(do_status(&d.q, at, 2 * MIB - at, &status), 0);
        CHECK(status.len >= 1 && status.len <= 2 * MIB - at);
        CHECK_EQ(status.struct_size, sizeof(status));
        CHECK(status.place <= FVD_PLACE_BASE);
        seen[status.place]++;
        if (status.place == FVD_PLACE_DATA) {
            CHECK_EQ(status.file, FVD_FILE_IMAGE);
            uint8_t *buf = malloc(status.len);
            CHECK(buf);
            CHECK_EQ(do_read(&d.q, buf, status.len, at), 0);
            for (uint64_t i = 0; i < status.len; i++) {
                uint64_t in_file = status.offset + i;
                /* What the file does not have yet reads as zero. */
                uint8_t byte = in_file < d.host.files[0].len ? d.host.files[0].data[in_file] : 0;
                CHECK_EQ(buf[i], byte);
            }
            free(buf);
        } else if (status.place == FVD_PLACE_ZERO) {
            check_bytes(&d.q, 0, status.len, at);
        } else {
            check_base(&d.q, status.len, at);
        }
        at += status.len;
    }
    CHECK_EQ(at, 2 * MIB);
    CHECK(seen[FVD_PLACE_DATA] && seen[FVD_PLACE_BASE]);
    disk_end(&d);
}

int main(void)
{
    for (enum mode mode = 0; mode < MODES; mode++) {
        zeroes(mode, 0);
        zeroes(mode, FVD_REQ_MAY_UNMAP);
        discards(mode);
        block_status(mode);
    }
    return 0;
}
