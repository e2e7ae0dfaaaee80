// SPDX-License-Identifier: MIT OR Apache-2.0
// The header is good C++, with C linkage.
#include <fvd.h>

static int calls;

extern "C" {
static void done(void *, int64_t ret, const char *error)
{
    calls += ret < 0 && error;
}
}

int main()
{
    fvd_submit_open(nullptr, done, nullptr);
    return calls == 1 ? 0 : 1;
}
