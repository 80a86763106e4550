"""Writes the functions of NVIDIA's libraries that torch wants and the null device has no use for.

    python make_stubs.py IMPORTS CUDA_H FOLDER

FOLDER/stubs.inc, a part of null_cuda.cpp: every cuBLAS, cuSOLVER and NCCL function in the list IMPORTS. Each succeeds;
products and collectives leave their sizes in the log of launches. FOLDER/driver.cpp: all functions of the driver's
header CUDA_H, for libcuda.so.1.
"""
import re
import sys
from pathlib import Path

API = 'extern "C" __attribute__((visibility("default")))'
SILENT = ("Create", "Destroy", "Set", "Get", "Version", "Group", "Layout", "Preference", "Comm", "_bufferSize")  # never launches

# functions that fill something in, or say how large their work is: return type, arguments, body
HANDLE = "*handle = (void*)(next_handle += 16); return 0;"
SHAPE = "char shape[128]; snprintf(shape, sizeof shape, "
GEMM = {  # a product's operands have a type argument; many products have strides and a batch
    "cublasGemmEx": (True, False), "cublasGemmStridedBatchedEx": (True, True),
    "cublasSgemm_v2": (False, False), "cublasSgemmStridedBatched": (False, True),
}
COLLECTIVES = {
    "ncclAllReduce": "const void* from, void* to, size_t count, int type, int, void*, cudaStream_t stream",
    "ncclReduceScatter": "const void* from, void* to, size_t count, int type, int, void*, cudaStream_t stream",
    "ncclAllGather": "const void* from, void* to, size_t count, int type, void*, cudaStream_t stream",
    "ncclBroadcast": "const void* from, void* to, size_t count, int type, int, void*, cudaStream_t stream",
}
SPECIAL = {
    "ncclGetErrorString": ("const char*", "int", 'return "null";'),
    "ncclGetLastError": ("const char*", "void*", 'return "null";'),
    "ncclGetVersion": ("int", "int* version", "*version = 22907; return 0;"),
    "ncclGetUniqueId": ("int", "char* id", "memset(id, 7, 128); return 0;"),
    "ncclCommGetAsyncError": ("int", "void*, int* error", "*error = 0; return 0;"),
    "ncclCommInitRankConfig": ("int", "void** handle, ...", HANDLE),
    "ncclCommInitRank": ("int", "void** handle, ...", HANDLE),
    "ncclCommInitRankScalable": ("int", "void** handle, ...", HANDLE),
    "ncclCommSplit": ("int", "void*, int, int, void** handle, ...", HANDLE),
    "cublasCreate_v2": ("int", "void** handle", HANDLE),
    "cusolverDnCreate": ("int", "void** handle", HANDLE),
    "cusolverDnCreateParams": ("int", "void** handle", HANDLE),
    "cublasSetStream_v2": ("int", "void*, cudaStream_t stream", "library_stream = stream; return 0;"),
    "cublasGetMathMode": ("int", "void*, int* mode", "*mode = 0; return 0;"),
    "cublasGetPointerMode_v2": ("int", "void*, int* mode", "*mode = 0; return 0;"),
    "cublasLtGetVersion": ("size_t", "", "return 130100;"),
    "cublasLtMatmulAlgoGetHeuristic": ("int", "void*, void*, void*, void*, void*, void*, void*, int, void* result, int* found",
                                       "memset(result, 0, 64); *found = 1; return 0;"),
    "cublasLtMatrixLayoutCreate": ("int", "void** layout, int type, uint64_t rows, uint64_t columns, int64_t",
                                   "*layout = new Layout{rows, columns, type}; return 0;"),
    "cublasLtMatrixLayoutDestroy": ("int", "void* layout", "delete (Layout*)layout; return 0;"),
    "cublasLtMatmul": ("int", "void*, void*, const void*, const void*, Layout* a, const void*, Layout*, const void*, const void*, Layout*, "
                       "void*, Layout* d, const void*, void*, size_t, cudaStream_t stream",
                       f'{SHAPE}"m %lu n %lu k %lu batch 1 type %d adds 0", d->rows, d->cols, a->rows == d->rows ? a->cols : a->rows, '
                       'd->type); '
                       'return note("cublasLtMatmul", stream, shape, KERNEL);'),
    "cusolverDnXpotrf_bufferSize": ("int", "void*, void*, int, int64_t, int, const void*, int64_t, int, size_t* device, size_t* host",
                                    "*device = *host = 1024; return 0;"),
}


def product(name: str, typed: bool, batched: bool) -> str:
    """A product of cuBLAS, which notes its sizes, its type, and whether it adds to what is there (beta)."""
    stride, kind = ", long long" * batched, "int{}, " * typed
    operands = [f"const void*, {kind.format(word)}int{stride}" for word in (" type", "", "")]
    arguments = ["void*, int, int, int m, int n, int k, const float*", *operands[:2], "const float* beta", operands[2]]
    arguments += ["int batch"] * batched
    shape = f'"m %d n %d k %d batch %d type %d adds %d", m, n, k, {"batch" if batched else 1}, {"type" if typed else 0}, *beta != 0'
    body = f'{SHAPE}{shape}); return note("{name}", library_stream, shape, KERNEL);'
    return f"API int {name}({', '.join(arguments)}{', ...' * typed}) {{ {body} }}"


def function(name: str) -> str:
    """The definition of one library function."""
    if name in GEMM:
        return product(name, *GEMM[name])
    if name in COLLECTIVES:
        body = (f'{SHAPE}"count %zu type %d in place %td", count, type, (const char*)from - (const char*)to); '
                f'return note("{name}", stream, shape, COLLECTIVE);')
        return f"API int {name}({COLLECTIVES[name]}) {{ {body} }}"
    if name in SPECIAL:
        returned, arguments, body = SPECIAL[name]
        return f"API {returned} {name}({arguments}) {{ {body} }}"
    if any(word in name for word in SILENT):
        return f"API int {name}() {{ return 0; }}"
    return f'API int {name}() {{ return note("{name}", library_stream, "", KERNEL); }}'


def driver(header: str) -> str:
    """libcuda.so.1: every function of the header, in all its versions, returning success."""
    special = {
        "cuGetErrorString": "(int, const char** text) { *text = \"null\"; return 0; }",
        "cuGetErrorName": "(int, const char** text) { *text = \"null\"; return 0; }",
        "cuCtxGetCurrent": "(void** context) { *context = (void*)1; return 0; }",
        "cuDevicePrimaryCtxGetState": "(int, unsigned* flags, int* active) { *flags = 0; *active = 1; return 0; }",
        "cuDriverGetVersion": "(int* version) { *version = 13000; return 0; }",
        "cuDeviceGetCount": "(int* count) { *count = 1; return 0; }",
    }
    plain = {re.sub(r"_v\d$", "", name) for name in re.findall(r"CUDAAPI\s+(cu[A-Z]\w+)\s*\(", header)}
    names = sorted(name + version for name in plain for version in ("", "_v2", "_v3"))
    return "\n".join(f"{API} int {name}{special.get(name, '(...) { return 0; }')}" for name in names) + "\n"


def main() -> None:
    imports, header, folder = map(Path, sys.argv[1:])
    names = [name for name in imports.read_text().split() if name.startswith(("cublas", "cusolverDn", "nccl"))]
    (folder / "stubs.inc").write_text("\n".join(map(function, names)) + "\n")
    (folder / "driver.cpp").write_text(driver(header.read_text()))


if __name__ == "__main__":
    main()
