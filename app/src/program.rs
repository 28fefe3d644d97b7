//! The program: its command line, its window, its log.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use eframe::egui;
use kimi_linear_app::fonts;
use kimi_linear_app::kept::Keeper;
use kimi_linear_app::log::{Log, PANEL};
use kimi_linear_app::script::{self, Ending, Player, Step};
use kimi_linear_app::session::{Wake, local, remote};
use kimi_linear_app::settings::{BackendName, Settings};
use kimi_linear_app::shell::{ARRANGEMENT, App, SETTINGS, Start};
use kimi_linear_app::theme;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// The name under which the system stores settings and layout.
const ID: &str = "kimi-linear";

/// Interval at which new text is drawn: a fast model has several tokens in a frame then, and drawing takes less of the time
/// that the model needs.
const SPACING: Duration = Duration::from_millis(33);
/// The same on a software renderer, where a frame of 1280 x 800 takes a tenth of a second of a CPU core.
const SOFTWARE_SPACING: Duration = Duration::from_millis(200);

/// Chat with a Kimi Linear model and watch its memory.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Model: a folder with config.json, tokenizer files and safetensors weights, or a GGUF. Default: the last model, at
    /// first the built-in demo model.
    #[arg(long, value_name = "DIR|FILE", conflicts_with = "connect")]
    model: Option<PathBuf>,
    /// Run the demo model instead of the last one.
    #[arg(long, conflicts_with_all = ["model", "connect"])]
    demo: bool,
    /// Backend to run on. Default: that of the last run, at first a GPU if there is one, otherwise the CPU.
    #[arg(long, value_enum, conflicts_with = "connect")]
    backend: Option<BackendName>,
    /// Device number, as listed by `kimi-linear devices`. Default: the backend's best device.
    #[arg(long, value_name = "N", requires = "backend")]
    device: Option<usize>,
    /// Maximum length of a conversation in tokens.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    /// Chat with the model of a running server, such as `kimi-linear serve`, without the views of its state. OPENAI_API_KEY
    /// is sent if it is set.
    #[arg(long, value_name = "URL")]
    connect: Option<String>,
    /// Run a script that types a conversation and saves screenshots, and exit; docs/app.md lists the steps. Nothing is kept
    /// of such a run.
    #[arg(long, value_name = "FILE")]
    demo_script: Option<PathBuf>,
    /// Folder for the script's files.
    #[arg(
        long,
        value_name = "DIR",
        default_value = ".",
        requires = "demo_script"
    )]
    out: PathBuf,
}

pub(crate) fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let log = Log::default();
    begin_log(&log);
    match run(arguments, log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            use std::io::Write;
            // If stderr is closed too, the exit status still shows the failure.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The log panel shows messages of interest to users; the terminal only what `KIMI_LINEAR_LOG` asks for.
fn begin_log(log: &Log) {
    let panel = EnvFilter::new(PANEL);
    // No messages of winit: after a window has closed it warns of every event that was still queued.
    let asked = std::env::var("KIMI_LINEAR_LOG").unwrap_or_else(|_| "error,winit=off".to_owned());
    let terminal = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_filter(EnvFilter::new(asked));
    tracing_subscriber::registry()
        .with(log.clone().with_filter(panel))
        .with(terminal)
        .init();
}

fn run(arguments: Arguments, log: Log) -> Result<()> {
    let steps = arguments.demo_script.as_ref().map(|file| {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read {}", file.display()))?;
        script::parse(&text).map_err(|error| anyhow::anyhow!("{}: {error}", file.display()))
    });
    let steps = steps.transpose()?;
    let scripted = steps.is_some();
    let options = options(steps.as_deref());
    let ending = Ending::default();
    let ended = Arc::clone(&ending);
    let shown = eframe::run_native(
        ID,
        options,
        Box::new(move |creation| {
            let ctx = creation.egui_ctx.clone();
            fonts::follow(&ctx);
            let drawn_by = creation.wgpu_render_state.as_ref();
            let software = drawn_by.is_some_and(|state| {
                state.adapter.get_info().device_type == eframe::wgpu::DeviceType::Cpu
            });
            if software {
                theme::keep_still(&ctx);
            }
            let spacing = if software { SOFTWARE_SPACING } else { SPACING };
            let wake: Wake = Arc::new(move || ctx.request_repaint_after(spacing));
            let folder = eframe::storage_dir(ID);
            let history = folder.as_ref().filter(|_| !scripted);
            let history = history.map(|folder| folder.join("history"));
            let keeper = history.map(|history| Keeper::start(history, Arc::clone(&wake)));
            let session = match &arguments.connect {
                Some(url) => remote::start(url, wake)?,
                None => local::start(wake)?,
            };
            let storage = creation.storage.filter(|_| !scripted);
            let kept = storage.and_then(|storage| eframe::get_value::<Settings>(storage, SETTINGS));
            let mut settings = kept.unwrap_or_default();
            heed(&mut settings, &arguments);
            if steps.is_some() {
                std::fs::create_dir_all(&arguments.out)
                    .map_err(|error| format!("{}: {error}", arguments.out.display()))?;
            }
            let player = steps.map(|steps| Player::new(steps, &arguments.out, ended));
            Ok(Box::new(App::new(Start {
                session,
                settings,
                arrangement: storage.and_then(|storage| eframe::get_value(storage, ARRANGEMENT)),
                log,
                folder: folder.map(|folder| folder.join("chats")),
                keeper: keeper.transpose()?,
                script: player,
                kept: !scripted,
            })))
        }),
    );
    shown.map_err(|error| {
        anyhow::anyhow!(
            "no window can be shown: {}. It needs a display and a Vulkan, Metal or DX12 driver (on Linux without a GPU: \
             mesa-vulkan-drivers); `kimi-linear chat` needs neither",
            reason(&error)
        )
    })?;
    let ended = ending.lock().unwrap_or_else(PoisonError::into_inner).take();
    match ended {
        Some(how) => how.map_err(|reason| anyhow::anyhow!("the script ended early: {reason}")),
        None if scripted => Err(anyhow::anyhow!(
            "the window was closed before the script had ended"
        )),
        None => Ok(()),
    }
}

/// The window: of the script's size, or such that it fits a small screen with the system's bars.
fn options(steps: Option<&[Step]>) -> eframe::NativeOptions {
    let size = steps.into_iter().flatten().find_map(|step| match step {
        Step::Size(width, height) => Some([*width, *height]),
        _ => None,
    });
    let viewport = egui::ViewportBuilder::default()
        .with_title("Kimi Linear")
        .with_app_id(ID)
        .with_inner_size(size.unwrap_or([1200.0, 720.0]))
        .with_min_inner_size([320.0, 240.0]);
    eframe::NativeOptions {
        viewport,
        persist_window: steps.is_none(),
        ..eframe::NativeOptions::default()
    }
}

/// The command line takes precedence over stored settings.
fn heed(settings: &mut Settings, arguments: &Arguments) {
    let model = &mut settings.model;
    if arguments.model.is_some() || arguments.demo {
        model.folder.clone_from(&arguments.model);
    }
    if let Some(backend) = arguments.backend {
        (model.backend, model.device) = (backend, arguments.device);
    }
    if let Some(context) = arguments.context {
        model.context = context as usize;
    }
}

/// An error of the window system in words. Its own text has the place in its source, and ends in dots.
fn reason(error: &eframe::Error) -> String {
    let unset = |name: &str| std::env::var_os(name).is_none_or(|value| value.is_empty());
    let linux = cfg!(all(unix, not(target_os = "macos")));
    if matches!(error, eframe::Error::WinitEventLoop(_))
        && linux
        && unset("DISPLAY")
        && unset("WAYLAND_DISPLAY")
    {
        return "there is no display (DISPLAY and WAYLAND_DISPLAY are not set)".to_owned();
    }
    let text = error.to_string();
    let end = text.rsplit(".rs:").next().unwrap_or(&text);
    let words = end.split_once(": ").map_or(end, |(_, words)| words);
    words.trim_end_matches('.').to_owned()
}
