//! Facts about the machine that the program runs on; a browser reports none.

/// The machine's memory, in bytes.
#[cfg(not(target_arch = "wasm32"))]
pub(super) fn memory() -> Option<u64> {
    let kinds = sysinfo::RefreshKind::nothing()
        .with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram());
    sysinfo::System::new_with_specifics(kinds)
        .ok()
        .map(|system| system.total_memory())
}

/// The machine's memory, in bytes.
#[cfg(target_arch = "wasm32")]
pub(super) fn memory() -> Option<u64> {
    None
}

/// The CPU's own name, or its architecture.
pub(super) fn cpu() -> String {
    brand().unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

#[cfg(not(target_arch = "wasm32"))]
fn brand() -> Option<String> {
    let kinds = sysinfo::RefreshKind::nothing().with_cpu(sysinfo::CpuRefreshKind::nothing());
    let system = sysinfo::System::new_with_specifics(kinds).ok()?;
    let brand = system.cpus().first()?.brand().trim();
    (!brand.is_empty()).then(|| brand.to_owned())
}

#[cfg(target_arch = "wasm32")]
fn brand() -> Option<String> {
    None
}
