//! Dense products of a prefill's rows by cuBLASLt; rows of single tokens and of outputs have a kernel (`kernels/linear.cu`).
//! Its algorithm is chosen once for a weight's shape, not for the number of rows, so that a row's sums run in the same order
//! whatever is beside it.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::result::{self as lt, CublasError};
use cudarc::cublaslt::sys::{self, cublasLtMatmulDescAttributes_t as Attribute, cudaDataType_t};

use super::{Context, told, unavailable};
use crate::backend::Result;
use crate::backend::cuda::machine::Product;
use crate::error::BackendError;

/// Bytes of workspace: what cuBLAS recommends on Hopper.
const WORKSPACE: usize = 32 << 20;
/// Rows for which an algorithm is chosen: a piece of a prefill.
const TYPICAL_ROWS: usize = 256;

fn said<T>(what: &str, result: std::result::Result<T, CublasError>) -> Result<T> {
    result.map_err(|error| BackendError::Driver {
        backend: "cuda",
        what: what.to_owned(),
        reason: format!("cuBLASLt says {:?}", error.0),
    })
}

pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    description: sys::cublasLtMatmulDesc_t,
    workspace: u64,
    /// By outputs, columns and whether the result is f32.
    algorithms: HashMap<(usize, usize, bool), sys::cublasLtMatmulAlgo_t>,
}

// SAFETY: cuBLASLt's handles may be used from any thread; they live behind a lock.
unsafe impl Send for Products {}

/// The layout of a matrix, column by column.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(kind: cudaDataType_t, rows: usize, columns: usize) -> Result<Self> {
        let made = lt::create_matrix_layout(kind, rows as u64, columns as u64, rows as i64);
        said("a product's layout", made).map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        let _ = unsafe { lt::destroy_matrix_layout(self.0) };
    }
}

/// `output^T = weight input^T`, column by column, which is `output = input weight^T` row by row.
struct Layouts {
    weight: Layout,
    input: Layout,
    output: Layout,
}

impl Layouts {
    fn new(product: &Product, rows: usize) -> Result<Self> {
        let half = cudaDataType_t::CUDA_R_16BF;
        let result = if product.full {
            cudaDataType_t::CUDA_R_32F
        } else {
            half
        };
        Ok(Self {
            weight: Layout::new(half, product.columns, product.outputs)?,
            input: Layout::new(half, product.columns, rows)?,
            output: Layout::new(result, product.outputs, rows)?,
        })
    }
}

impl Products {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self> {
        // SAFETY: it only tries to open a library.
        if !unsafe { sys::is_culib_present() } {
            return Err(unavailable(
                "NVIDIA's library cuBLASLt (libcublasLt) is not found: install the CUDA toolkit, or put the folder of \
                 PyPI's nvidia-cublas on LD_LIBRARY_PATH",
            ));
        }
        context.enter()?;
        let handle = said("cuBLASLt", lt::create_handle())?;
        let mut products = Self {
            handle,
            description: std::ptr::null_mut(),
            workspace: 0,
            algorithms: HashMap::new(),
        };
        let (compute, scale) = (
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            cudaDataType_t::CUDA_R_32F,
        );
        products.description = said("a product", lt::create_matmul_desc(compute, scale))?;
        let transposed = 1_i32;
        // SAFETY: the description lives, and the attribute is an i32.
        said("a product", unsafe {
            lt::set_matmul_desc_attribute(
                products.description,
                Attribute::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of::<i32>(),
            )
        })?;
        // SAFETY: freed in `drop`.
        products.workspace = told("a workspace", unsafe {
            cudarc::driver::result::malloc_sync(WORKSPACE)
        })?;
        Ok(products)
    }

    fn algorithm(&mut self, product: &Product) -> Result<sys::cublasLtMatmulAlgo_t> {
        let key = (product.outputs, product.columns, product.full);
        if let Some(algorithm) = self.algorithms.get(&key) {
            return Ok(*algorithm);
        }
        let layouts = Layouts::new(product, TYPICAL_ROWS)?;
        let preference = said("a product's preference", lt::create_matmul_pref())?;
        let bytes = WORKSPACE;
        // SAFETY: everything named lives; the preference is destroyed here whatever comes of it.
        let found = unsafe {
            let set = lt::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const bytes).cast(),
                size_of::<usize>(),
            );
            let found = set.and_then(|()| {
                lt::get_matmul_algo_heuristic(
                    self.handle,
                    self.description,
                    layouts.weight.0,
                    layouts.input.0,
                    layouts.output.0,
                    layouts.output.0,
                    preference,
                )
            });
            let _ = lt::destroy_matmul_pref(preference);
            found
        };
        let algorithm = said("the choice of a product's algorithm", found)?.algo;
        self.algorithms.insert(key, algorithm);
        Ok(algorithm)
    }

    pub(super) fn run(&mut self, context: &Arc<Context>, product: &Product) -> Result<()> {
        let algorithm = self.algorithm(product)?;
        let layouts = Layouts::new(product, product.rows)?;
        let (one, zero) = (1.0_f32, 0.0_f32);
        // SAFETY: whoever records a product vouches for its operands; all handles live; one stream has one workspace.
        said("a product", unsafe {
            lt::matmul(
                self.handle,
                self.description,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                product.weight as *const c_void,
                layouts.weight.0,
                product.input as *const c_void,
                layouts.input.0,
                product.output as *const c_void,
                layouts.output.0,
                product.output as *mut c_void,
                layouts.output.0,
                &raw const algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                context.stream.cast(),
            )
        })
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        unsafe {
            if !self.description.is_null() {
                let _ = lt::destroy_matmul_desc(self.description);
            }
            if self.workspace != 0 {
                let _ = cudarc::driver::result::free_sync(self.workspace);
            }
            let _ = lt::destroy_handle(self.handle);
        }
    }
}
