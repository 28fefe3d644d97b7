//! Dense products of a prefill's rows by cuBLASLt; rows of single tokens and of outputs have a kernel (`kernels/linear.cu`).
//! Its algorithm is chosen once for a weight's shape, not for the number of rows, so that a row's sums run in the same order
//! whatever is beside it; one that does not do for some number of rows is chosen anew for that one.
//!
//! What the library was asked is kept as a plan for each shape and number of rows, so that a product that ran once asks
//! nothing any more: while a stream is captured, some versions of the library answer a question with an error.

use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::rc::Rc;
use std::sync::Arc;

use cudarc::cublaslt::result::{self as lt, CublasError};
use cudarc::cublaslt::sys::{self, cublasLtMatmulDescAttributes_t as Attribute, cudaDataType_t};
use cudarc::driver::CudaStream;

use super::{driver_call, unavailable};
use crate::backend::Result;
use crate::backend::cuda::machine::{Command, Product};
use crate::error::BackendError;

/// Bytes of workspace: what cuBLAS recommends on Hopper.
const WORKSPACE: usize = 32 << 20;
/// Rows for which an algorithm is chosen: those of a long prompt's segments, which take most of a prefill's time.
const TYPICAL_ROWS: usize = 8192;
/// Plans kept, a few hundred bytes each. A server's segments have many lengths; a plan that went is made again.
const MOST_PLANS: usize = 4096;

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
    algorithms: HashMap<Shape, sys::cublasLtMatmulAlgo_t>,
    plans: HashMap<(Shape, usize), Rc<MetadataLayout>>,
}

/// Outputs, columns, and whether the result is f32.
type Shape = (usize, usize, bool);

/// What runs a product of one shape and number of rows.
struct MetadataLayout {
    layouts: Layouts,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: cuBLASLt's handles may be used from any thread; they live behind a lock, and no plan leaves it.
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

fn shape_of(product: &Product) -> Shape {
    (product.outputs, product.columns, product.full)
}

fn product_of(command: &Command) -> Option<&Product> {
    match command {
        Command::Product(product) => Some(product),
        Command::Launch(_) | Command::Copy { .. } => None,
    }
}

impl Products {
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        // SAFETY: it only tries to open a library.
        if !unsafe { sys::is_culib_present() } {
            return Err(unavailable(
                "NVIDIA's library cuBLASLt (libcublasLt) is not found: install the CUDA toolkit, or put the folder of \
                 PyPI's nvidia-cublas on LD_LIBRARY_PATH",
            ));
        }
        driver_call("its context", stream.context().bind_to_thread())?;
        let handle = said("cuBLASLt", lt::create_handle())?;
        let mut products = Self {
            handle,
            description: std::ptr::null_mut(),
            workspace: 0,
            algorithms: HashMap::new(),
            plans: HashMap::new(),
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
        products.workspace = driver_call("a workspace", unsafe {
            cudarc::driver::result::malloc_sync(WORKSPACE)
        })?;
        Ok(products)
    }

    /// Plans every product of a list that has no plan yet.
    ///
    /// # Errors
    /// What cuBLASLt refuses.
    pub(super) fn plan_all(&mut self, commands: &[Command]) -> Result<()> {
        let products = || commands.iter().filter_map(product_of);
        // Together they must stay: nothing may be planned while they are captured.
        if self.plans.len() + products().count() > MOST_PLANS {
            self.plans.clear();
        }
        products().try_for_each(|product| self.plan(product).map(drop))
    }

    fn plan(&mut self, product: &Product) -> Result<Rc<MetadataLayout>> {
        let key = (shape_of(product), product.rows);
        if let Some(plan) = self.plans.get(&key) {
            return Ok(Rc::clone(plan));
        }
        let layouts = Layouts::new(product, product.rows)?;
        let usual = self.usual(product)?;
        let algorithm = if self.does(&usual, &layouts) {
            usual
        } else {
            self.choose(&layouts)?
        };
        if self.plans.len() >= MOST_PLANS {
            self.plans.clear();
        }
        let plan = Rc::new(MetadataLayout { layouts, algorithm });
        self.plans.insert(key, Rc::clone(&plan));
        Ok(plan)
    }

    /// The algorithm for a weight's shape.
    fn usual(&mut self, product: &Product) -> Result<sys::cublasLtMatmulAlgo_t> {
        let shape = shape_of(product);
        if let Some(algorithm) = self.algorithms.get(&shape) {
            return Ok(*algorithm);
        }
        let chosen = self.choose(&Layouts::new(product, TYPICAL_ROWS)?)?;
        Ok(*self.algorithms.entry(shape).or_insert(chosen))
    }

    /// Whether an algorithm that was chosen for other rows does for these, within the workspace.
    fn does(&self, algorithm: &sys::cublasLtMatmulAlgo_t, layouts: &Layouts) -> bool {
        let mut result = MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::uninit();
        // SAFETY: all handles live; the result is read only where the call has written it.
        unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.handle,
                self.description,
                layouts.weight.0,
                layouts.input.0,
                layouts.output.0,
                layouts.output.0,
                std::ptr::from_ref(algorithm),
                result.as_mut_ptr(),
            )
            .result()
            .is_ok_and(|()| result.assume_init().workspaceSize <= WORKSPACE)
        }
    }

    /// The best of the algorithms that sum in one go: parts that are summed apart may be rounded to bf16 in between.
    fn choose(&self, layouts: &Layouts) -> Result<sys::cublasLtMatmulAlgo_t> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;

        let preference = said("a product's preference", lt::create_matmul_pref())?;
        let (bytes, no_scheme) = (WORKSPACE, 0_u32);
        // SAFETY: everything named lives, and each attribute has its size; the preference is destroyed here whatever comes
        // of it.
        let found = unsafe {
            let set = |attribute, value: *const c_void, size| {
                lt::set_matmul_pref_attribute(preference, attribute, value, size)
            };
            let found = set(
                Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const bytes).cast(),
                size_of::<usize>(),
            )
            .and_then(|()| {
                set(
                    Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                    (&raw const no_scheme).cast(),
                    size_of::<u32>(),
                )
            })
            .and_then(|()| {
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
        Ok(said("the choice of a product's algorithm", found)?.algo)
    }

    /// Puts a product on the stream. One that was planned asks the library nothing.
    ///
    /// # Errors
    /// What cuBLASLt refuses.
    pub(super) fn run(&mut self, stream: &CudaStream, product: &Product) -> Result<()> {
        let plan = self.plan(product)?;
        let MetadataLayout { layouts, algorithm } = &*plan;
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
                std::ptr::from_ref(algorithm),
                self.workspace as *mut c_void,
                WORKSPACE,
                stream.cu_stream().cast(),
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
