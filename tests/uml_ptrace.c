/* Let user-mode-linux boot on processors whose register state has outgrown it.
 *
 * UML 6.1 keeps 2696 bytes of extended registers (up to AVX-512) and sets them by PTRACE_SETREGSET. A host whose
 * processor has AMX expects 11008 bytes and refuses less with EFAULT, so init dies at its first instruction. Preloaded
 * into linux.uml, this sets the first 2696 bytes and leaves the rest as the process has it; nothing under test uses AMX.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <stdalign.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

typedef long (*ptrace_function)(int request, ...);

long ptrace(enum __ptrace_request request, ...)
{
    static ptrace_function next;
    static alignas(64) char state[32768]; /* UML has one thread, and stacks smaller than this */
    struct iovec whole = {state, sizeof state};
    va_list arguments;

    va_start(arguments, request);
    int pid = va_arg(arguments, int);
    void *address = va_arg(arguments, void *);
    void *data = va_arg(arguments, void *);
    va_end(arguments);
    if (!next)
        next = (ptrace_function)dlsym(RTLD_NEXT, "ptrace");
    if (request == PTRACE_SETREGSET && address == (void *)NT_X86_XSTATE) {
        struct iovec *given = data;
        if (next(PTRACE_GETREGSET, pid, address, &whole) == 0 && given->iov_len < whole.iov_len) {
            memcpy(state, given->iov_base, given->iov_len);
            data = &whole;
        }
    }
    return next(request, pid, address, data);
}
