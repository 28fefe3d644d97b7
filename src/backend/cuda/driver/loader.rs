//! Selects the code of each kernel for the driver: machine code, else PTX, else PTX that NVRTC compiles.
//!
//! A folder of compiled kernels comes with the program: `kernels` beside it, or the one in `KIMI_LINEAR_KERNELS`. Its files
//! are named by a hash over source and options: `HASH.cubin` is machine code for one architecture, `HASH.ptx` is PTX that the
//! driver compiles. PTX that NVRTC compiles is stored in the user's cache, with the driver's version in its name. A file that
//! the driver refuses, such as PTX of a newer compiler, is skipped with a warning. This file does not call the driver.

use std::fmt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::compile::{key, options};
use crate::backend::Result;
use crate::backend::cuda::kernels::{KERNELS, written_out};
use crate::error::BackendError;

/// The source of a kernel's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// Machine code that came with the program.
    Cubin,
    /// PTX that came with the program.
    Ptx,
    /// PTX that NVRTC compiled in an earlier run.
    Kept,
    /// PTX that NVRTC compiled in this run.
    Compiled,
}

/// Number of kernel files per source, as far as file names show.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Found {
    /// The folder of compiled kernels.
    pub folder: Option<PathBuf>,
    /// Machine code in the folder.
    pub cubins: usize,
    /// PTX in the folder.
    pub ptx: usize,
    /// PTX that NVRTC compiled in an earlier run.
    pub kept: usize,
    /// Kernels that NVRTC has to compile.
    pub missing: usize,
    /// NVRTC's version; `None` if it is not found.
    pub nvrtc: Option<String>,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if self.cubins > 0 {
            parts.push(format!("{} as machine code (cubin)", self.cubins));
        }
        if self.ptx > 0 {
            parts.push(format!("{} as PTX for the driver", self.ptx));
        }
        if self.kept > 0 {
            parts.push(format!("{} compiled before", self.kept));
        }
        if self.missing > 0 {
            parts.push(match &self.nvrtc {
                Some(version) => format!(
                    "{} that NVRTC {version} compiles when they are first used",
                    self.missing
                ),
                None => format!("{} missing, and NVRTC is not found", self.missing),
            });
        }
        write!(f, "{}", parts.join(", "))?;
        match &self.folder {
            Some(folder) if self.cubins + self.ptx > 0 => write!(f, ", from {}", folder.display()),
            _ => Ok(()),
        }
    }
}

/// Finds code for the devices of one compute capability.
pub(super) struct Loader {
    /// Compiled kernels that came with the program.
    pub(super) folder: Option<PathBuf>,
    /// Compiled kernels of this machine.
    pub(super) cache: Option<PathBuf>,
    options: Vec<String>,
    driver: i32,
}

/// The driver's loading of code, for the named file.
type Take<'a, M> = &'a mut dyn FnMut(&'static str, Vec<u8>) -> Result<M>;
/// Compiles a file's source with these options to PTX.
type Compile<'a> = &'a (dyn Fn(&str, &str, &[String]) -> Result<Vec<u8>> + Sync);

/// A module, its file, and the source of its code.
pub(super) type Loaded<M> = (&'static str, M, Origin);

/// A file without usable code, and why the code that was found was refused.
struct Missing {
    file: &'static str,
    source: String,
    refused: Option<BackendError>,
}

impl Loader {
    /// With the folders given by the environment and the program's location.
    pub(super) fn new(capability: (i32, i32), driver: i32) -> Self {
        Self {
            folder: folder(),
            cache: cache(),
            options: options(capability),
            driver,
        }
    }

    /// Files that may contain a source's code, the best first.
    fn candidates(&self, source: &str) -> Vec<(Origin, PathBuf)> {
        let packed = key(source, &self.options, None);
        let beside = |ending: &str| {
            let folder = self.folder.as_ref()?;
            Some(folder.join(format!("{packed}.{ending}")))
        };
        [
            (Origin::Cubin, beside("cubin")),
            (Origin::Ptx, beside("ptx")),
            (Origin::Kept, self.kept(source)),
        ]
        .into_iter()
        .filter_map(|(origin, path)| Some((origin, path?)))
        .collect()
    }

    fn kept(&self, source: &str) -> Option<PathBuf> {
        let name = key(source, &self.options, Some(self.driver));
        Some(self.cache.as_ref()?.join(format!("{name}.ptx")))
    }

    /// The contents of the folders, by file names only.
    pub(super) fn found(&self) -> Found {
        let mut found = Found {
            folder: self.folder.clone(),
            nvrtc: super::compile::version(),
            ..Found::default()
        };
        for (_, text) in KERNELS {
            let candidates = self.candidates(&written_out(text));
            match candidates.iter().find(|(_, path)| path.is_file()) {
                Some((Origin::Cubin, _)) => found.cubins += 1,
                Some((Origin::Ptx, _)) => found.ptx += 1,
                Some(_) => found.kept += 1,
                None => found.missing += 1,
            }
        }
        found
    }

    /// Every kernel's module. Kernels without code in any file are compiled, on all cores in parallel.
    ///
    /// # Errors
    /// A kernel that cannot be compiled, or whose compiled code the driver refuses.
    pub(super) fn load<M>(
        &self,
        take: Take<'_, M>,
        compile: Compile<'_>,
    ) -> Result<Vec<Loaded<M>>> {
        let mut loaded = Vec::with_capacity(KERNELS.len());
        let mut missing = Vec::new();
        for (file, text) in KERNELS {
            let source = written_out(text);
            match self.stored(file, &source, take) {
                Ok((module, origin)) => loaded.push((*file, module, origin)),
                Err(refused) => missing.push(Missing {
                    file,
                    source,
                    refused,
                }),
            }
        }
        if !missing.is_empty() {
            tracing::info!(
                kernels = missing.len(),
                "compiling CUDA kernels, which is done once"
            );
        }
        let compiled: Vec<Result<Vec<u8>>> = missing
            .par_iter()
            .map(|one| compile(one.file, &one.source, &self.options))
            .collect();
        for (one, code) in missing.into_iter().zip(compiled) {
            // Without a compiler, the reason why the existing file was refused is more useful.
            let code = code.map_err(|error| one.refused.unwrap_or(error))?;
            let module = take(one.file, code.clone())?;
            self.keep(&one.source, &code);
            loaded.push((one.file, module, Origin::Compiled));
        }
        Ok(loaded)
    }

    /// The module of a source whose code is in some file; otherwise why the last of these files was refused.
    fn stored<M>(
        &self,
        file: &'static str,
        source: &str,
        take: Take<'_, M>,
    ) -> std::result::Result<(M, Origin), Option<BackendError>> {
        let mut refused = None;
        for (origin, path) in self.candidates(source) {
            let Ok(code) = std::fs::read(&path) else {
                continue;
            };
            match take(file, code) {
                Ok(module) => return Ok((module, origin)),
                Err(error) => {
                    tracing::warn!("{}: {error}; it is skipped", path.display());
                    refused = Some(error);
                }
            }
        }
        Err(refused)
    }

    /// Stores compiled code. If the cache cannot be written, the next start compiles again.
    fn keep(&self, source: &str, code: &[u8]) {
        let Some(path) = self.kept(source) else {
            return;
        };
        // Renamed after it is written, so that the file is never incomplete.
        let keep = || -> std::io::Result<()> {
            let cache = path.parent().unwrap_or(Path::new("."));
            std::fs::create_dir_all(cache)?;
            let file = tempfile::NamedTempFile::new_in(cache)?;
            std::fs::write(file.path(), code)?;
            file.persist(&path).map_err(|error| error.error)?;
            Ok(())
        };
        if let Err(error) = keep() {
            tracing::debug!(%error, path = %path.display(), "a compiled kernel was not cached");
        }
    }
}

/// The folder of compiled kernels: `KIMI_LINEAR_KERNELS`, else `kernels` beside the program if it exists.
fn folder() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("KIMI_LINEAR_KERNELS") {
        return (!named.is_empty()).then(|| PathBuf::from(named));
    }
    let beside = std::env::current_exe().ok()?.parent()?.join("kernels");
    beside.is_dir().then_some(beside)
}

/// The folder of compiled kernels of this machine: `KIMI_LINEAR_CACHE`, else the user's cache folder.
fn cache() -> Option<PathBuf> {
    let named = std::env::var_os("KIMI_LINEAR_CACHE").filter(|folder| !folder.is_empty());
    let own = || dirs::cache_dir().map(|caches| caches.join("kimi-linear").join("cuda"));
    named.map(PathBuf::from).or_else(own)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const HOPPER: (i32, i32) = (9, 0);

    /// A test's folders, and the number of calls of the compiler.
    struct Fixture {
        folders: tempfile::TempDir,
        calls: AtomicUsize,
    }

    impl Fixture {
        fn new() -> Self {
            Self {
                folders: tempfile::tempdir().unwrap(),
                calls: AtomicUsize::new(0),
            }
        }

        fn loader(&self, capability: (i32, i32), driver: i32) -> Loader {
            let folder = |name| {
                let path = self.folders.path().join(name);
                std::fs::create_dir_all(&path).unwrap();
                Some(path)
            };
            Loader {
                folder: folder("kernels"),
                cache: folder("cache"),
                options: options(capability),
                driver,
            }
        }

        /// Writes a file for every kernel, as in a release's folder.
        fn pack(&self, loader: &Loader, ending: &str) {
            for (file, text) in KERNELS {
                let name = key(&written_out(text), &loader.options, None);
                let path = loader.folder.as_ref().unwrap();
                std::fs::write(
                    path.join(format!("{name}.{ending}")),
                    format!("{ending} of {file}"),
                )
                .unwrap();
            }
        }

        /// Loads with a driver that accepts code for which `takes` is true; returns the sources, and the number of calls of
        /// the compiler.
        fn load(&self, loader: &Loader, takes: fn(&[u8]) -> bool) -> (Vec<Origin>, usize) {
            self.calls.store(0, Ordering::Relaxed);
            let loaded = loader
                .load(
                    &mut |file, code| {
                        if takes(&code) {
                            assert!(String::from_utf8_lossy(&code).ends_with(file));
                            Ok(())
                        } else {
                            Err(refusal())
                        }
                    },
                    &|file, _, _| {
                        self.calls.fetch_add(1, Ordering::Relaxed);
                        Ok(format!("ptx of {file}").into_bytes())
                    },
                )
                .unwrap();
            assert_eq!(loaded.len(), KERNELS.len());
            let origins = loaded.into_iter().map(|(_, (), origin)| origin).collect();
            (origins, self.calls.load(Ordering::Relaxed))
        }
    }

    fn refusal() -> BackendError {
        BackendError::Driver {
            backend: "cuda",
            what: "a kernel".to_owned(),
            reason: "the provided PTX was compiled with an unsupported toolchain".to_owned(),
        }
    }

    fn all(origin: Origin) -> Vec<Origin> {
        vec![origin; KERNELS.len()]
    }

    #[test]
    fn a_fitting_cubin_is_taken_without_a_call_of_the_compiler() {
        let fixture = Fixture::new();
        let loader = fixture.loader(HOPPER, 13_000);
        fixture.pack(&loader, "ptx");
        fixture.pack(&loader, "cubin");
        assert_eq!(fixture.load(&loader, |_| true), (all(Origin::Cubin), 0));
        let found = loader.found();
        assert_eq!((found.cubins, found.missing), (KERNELS.len(), 0));
    }

    #[test]
    fn a_refused_cubin_gives_way_to_ptx_and_ptx_to_the_compiler() {
        let fixture = Fixture::new();
        let loader = fixture.loader(HOPPER, 12_080);
        fixture.pack(&loader, "cubin");
        fixture.pack(&loader, "ptx");
        let (origins, calls) = fixture.load(&loader, |code| code.starts_with(b"ptx"));
        assert_eq!((origins, calls), (all(Origin::Ptx), 0));
        for entry in std::fs::read_dir(loader.folder.as_ref().unwrap()).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|ending| ending == "ptx") {
                std::fs::remove_file(path).unwrap();
            }
        }
        let taken = |code: &[u8]| code.starts_with(b"ptx");
        let (origins, calls) = fixture.load(&loader, taken);
        assert_eq!((origins, calls), (all(Origin::Compiled), KERNELS.len()));
        // Compiled code is cached, for this driver only.
        assert_eq!(fixture.load(&loader, taken), (all(Origin::Kept), 0));
        let newer = fixture.loader(HOPPER, 13_000);
        assert_eq!(fixture.load(&newer, taken).1, KERNELS.len());
    }

    #[test]
    fn code_of_another_architecture_is_not_looked_at() {
        let fixture = Fixture::new();
        fixture.pack(&fixture.loader(HOPPER, 13_000), "cubin");
        let blackwell = fixture.loader((10, 0), 13_000);
        let (origins, calls) = fixture.load(&blackwell, |_| true);
        assert_eq!((origins, calls), (all(Origin::Compiled), KERNELS.len()));
    }

    #[test]
    fn without_a_compiler_the_error_says_why_the_file_was_refused() {
        let fixture = Fixture::new();
        let loader = fixture.loader(HOPPER, 12_080);
        fixture.pack(&loader, "cubin");
        let loaded = loader.load(&mut |_, _| Err::<(), _>(refusal()), &|_, _, _| {
            Err(super::super::unavailable("NVRTC is not found"))
        });
        assert_eq!(loaded.map(drop), Err(refusal()));
        let nothing = fixture.loader((10, 0), 12_080);
        let loaded = nothing.load(&mut |_, _| Err::<(), _>(refusal()), &|_, _, _| {
            Err(super::super::unavailable("NVRTC is not found"))
        });
        assert!(matches!(loaded, Err(BackendError::Unavailable { .. })));
    }
}
