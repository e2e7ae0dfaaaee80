/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The header needs nothing before it. */
#include <fvd.h>

typedef char every_struct_has_the_size_it_says[sizeof(struct fvd_limits) == 24 && sizeof(struct fvd_mapping) == 24 ? 1 : -1];

int main(void)
{
    return fvd_version() == 0;
}
