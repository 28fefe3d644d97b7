//! A person at a desktop: a display, the app in a real window, a keyboard and a pointer (xdotool), and a second program for
//! the clipboard (xclip).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

pub struct Person {
    display: String,
    xvfb: Child,
    /// The folder of the display's contents, the user's data, and the log.
    home: tempfile::TempDir,
    app: Option<Child>,
    window: String,
}

impl Person {
    /// Sits down at a screen of this size.
    pub fn new(width: u32, height: u32) -> Self {
        let home = tempfile::tempdir().unwrap();
        let mut xvfb = Command::new("Xvfb")
            .args(["-displayfd", "1", "-nolisten", "tcp", "-screen", "0"])
            .arg(format!("{width}x{height}x24"))
            .arg("-fbdir")
            .arg(home.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("this test needs Xvfb, xdotool and xclip: make install-xvfb");
        let mut number = String::new();
        let mut out = BufReader::new(xvfb.stdout.take().unwrap());
        out.read_line(&mut number).unwrap();
        let display = format!(":{}", number.trim());
        let (app, window) = (None, String::new());
        Self {
            display,
            xvfb,
            home,
            app,
            window,
        }
    }

    /// Starts the app, and waits for its window and its model.
    pub fn starts(&mut self, options: &[&str]) {
        let log = std::fs::File::create(self.home.path().join("log")).unwrap();
        let app = Command::new(env!("CARGO_BIN_EXE_kimi-linear-app"))
            .args(options)
            .env_remove("WAYLAND_DISPLAY")
            .env("DISPLAY", &self.display)
            .env("WINIT_X11_SCALE_FACTOR", "1")
            .env("XDG_DATA_HOME", self.home.path())
            .env("KIMI_LINEAR_LOG", "info,winit=off,wgpu_hal=off")
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.app = Some(app);
        let search = ["search", "--onlyvisible", "--name", "^Kimi Linear$"];
        self.window = self.until("the window", |person| person.xdotool(&search));
        self.logs("loaded");
        let window = self.window.clone();
        self.xdotool(&["windowfocus", &window]).unwrap();
    }

    /// Waits until the app has logged this.
    pub fn logs(&self, text: &str) {
        self.until(&format!("`{text}` in the log"), |person| {
            let log = std::fs::read_to_string(person.home.path().join("log")).unwrap();
            log.contains(text).then_some(())
        });
    }

    /// Presses keys, such as `ctrl+a` or `Return`.
    pub fn presses(&self, keys: &[&str]) {
        self.xdotool(&[&["key", "--delay", "30"], keys].concat())
            .unwrap();
    }

    /// Types a text.
    pub fn types(&self, text: &str) {
        self.xdotool(&["type", "--delay", "5", text]).unwrap();
    }

    /// Clicks a place of the window, in points.
    pub fn clicks(&self, (x, y): (f32, f32)) {
        let (x, y) = (x.round().to_string(), y.round().to_string());
        let window = &self.window;
        self.xdotool(&["mousemove", "--window", window, &x, &y])
            .unwrap();
        // The app learns where the pointer is with one event, and of the click with the next.
        std::thread::sleep(Duration::from_millis(300));
        self.xdotool(&["click", "1"]).unwrap();
    }

    /// What another program pastes, once it is this.
    pub fn pastes_elsewhere(&self, text: &str) {
        self.until(&format!("`{text}` in the clipboard"), |person| {
            let mut xclip = person.command("xclip");
            let out = xclip
                .args(["-o", "-selection", "clipboard"])
                .output()
                .unwrap();
            (String::from_utf8_lossy(&out.stdout) == text).then_some(())
        });
    }

    /// Copies in another program.
    pub fn copies_elsewhere(&self, text: &str) {
        let mut xclip = self
            .command("xclip")
            .args(["-i", "-selection", "clipboard"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut stdin = xclip.stdin.take().unwrap();
        stdin.write_all(text.as_bytes()).unwrap();
        drop(stdin);
        // It goes on in the background, and ends with the display.
        assert!(xclip.wait().unwrap().success());
    }

    /// The chats on disk.
    pub fn chats(&self) -> Vec<Value> {
        let folder = self.home.path().join("kimi-linear/history");
        let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let files = files.map(|entry| entry.path());
        let files = files.filter(|path| path.extension().is_some_and(|end| end == "json"));
        files
            .map(|path| serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap())
            .collect()
    }

    /// Waits for the answer to the last question of the only chat; returns both.
    pub fn answered(&self, turns: usize) -> (String, String) {
        self.until(&format!("answer {turns}"), |person| {
            let chats = person.chats();
            let [chat] = chats.as_slice() else {
                return None;
            };
            let all = chat["turns"].as_array().unwrap();
            let turn = all.last().filter(|_| all.len() == turns)?;
            let text = |name: &str| turn[name].as_str().unwrap_or_default().to_owned();
            turn["footer"]
                .is_string()
                .then(|| (text("question"), text("answer")))
        })
    }

    /// Waits for the end of the app, which has to be a good one.
    pub fn is_done(&mut self) {
        let mut app = self.app.take().unwrap();
        let status = self.until("the end of the app", |_| app.try_wait().unwrap());
        assert!(status.success(), "{status}");
    }

    /// Saves what is on the screen, once it has come to rest, for people to look at.
    pub fn looks(&self, path: &Path) {
        let read = || std::fs::read(self.home.path().join("Xvfb_screen0")).unwrap();
        let (began, mut screen) = (Instant::now(), Vec::new());
        while began.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(600));
            let now = read();
            if now == screen {
                break;
            }
            screen = now;
        }
        save(&screen, path);
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("DISPLAY", &self.display).stderr(Stdio::null());
        command
    }

    /// What xdotool prints; `None` if it fails.
    fn xdotool(&self, arguments: &[&str]) -> Option<String> {
        let out = self.command("xdotool").args(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).trim().to_owned();
        out.status.success().then_some(text)
    }

    /// Waits for something.
    #[track_caller]
    fn until<T>(&self, what: &str, mut look: impl FnMut(&Self) -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            if let Some(found) = look(self) {
                return found;
            }
            if began.elapsed() > PATIENCE {
                self.looks(&out().join("gave-up.png"));
                let log = std::fs::read_to_string(self.home.path().join("log"));
                panic!("{what} does not come\n{}", log.unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Saves the contents of a display's file: an XWD file of version 7, with colours of 12 bytes each after its header.
fn save(screen: &[u8], path: &Path) {
    let word = |at: usize| {
        let bytes = screen[4 * at..4 * at + 4].try_into().unwrap();
        u32::from_be_bytes(bytes) as usize
    };
    let (header, width, height, line, colours) = (word(0), word(4), word(5), word(12), word(19));
    let pixels = &screen[header + 12 * colours..];
    let image = image::RgbImage::from_fn(width as u32, height as u32, |x, y| {
        let at = y as usize * line + 4 * x as usize;
        image::Rgb([pixels[at + 2], pixels[at + 1], pixels[at]])
    });
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    image.save(path).unwrap();
}

/// Where pictures are kept.
pub fn out() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/app-person")
}

impl Drop for Person {
    fn drop(&mut self) {
        if let Some(app) = &mut self.app {
            let _ = app.kill();
            let _ = app.wait();
        }
        let _ = self.xvfb.kill();
        let _ = self.xvfb.wait();
    }
}
