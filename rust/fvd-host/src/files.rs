// SPDX-License-Identifier: MIT OR Apache-2.0
//! The files of an image: opened once, used by every thread. The base may be a chain of images.
//!
//! A base or a data file is opened only when the caller allows it, by the format the header states: nothing is
//! ever probed. The header is read through the engine; this crate knows no format.

use crate::disk::LocalHost;
use crate::file::FileIo;
use crate::pool::Pool;
use crate::raw::{How, Identity, RawFile};
use fvd_engine::host::{FILES, FileId, Limits, LogLevel};
use fvd_engine::{Config, Error, Image, Kind, Queue, Request, Result};
use fvd_format::Header;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

/// A function that gets the engine's messages for people.
pub type LogFn = Arc<dyn Fn(LogLevel, &str) + Send + Sync>;

/// How to open an image.
#[derive(Clone, Default)]
pub struct Options {
    /// Nothing is written; other readers are tolerated.
    pub read_only: bool,
    /// Past the page cache (O_DIRECT).
    pub direct: bool,
    /// Take no locks: for pictures of an image in use, and where somebody else keeps order.
    pub no_lock: bool,
    /// Open the base that the header names.
    pub allow_base: bool,
    /// Open the data file that the header names, of bases too. An image that has one cannot be read without.
    pub allow_data: bool,
    /// Only metadata is needed: the data file may be missing or too short. With `read_only`.
    pub metadata_only: bool,
    /// Longest chain of bases: 0 means the format's limit of 64, which is also the most.
    pub depth_max: u32,
    /// Do all I/O by threads, as with `FVD_HOST_AIO=threads`.
    pub threads: bool,
    /// Most metadata memory of each image in the chain, in bytes; 0: the engine's default.
    pub metadata_memory: u64,
    /// Where messages go; nowhere if not set.
    pub log: Option<LogFn>,
}

impl Options {
    /// The engine's configuration to go with these options.
    pub fn config(&self, limits: [Limits; FILES]) -> Config {
        let mut config = Config { limits, read_only: self.read_only, metadata_only: self.metadata_only, ..Config::default() };
        if self.metadata_memory != 0 {
            config.metadata_memory = self.metadata_memory;
        }
        config
    }

    fn how(&self) -> How {
        How { write: !self.read_only, create: false, direct: self.direct, lock: !self.no_lock }
    }

    fn depth_max(&self) -> usize {
        let max = fvd_format::limits::CHAIN_DEPTH_MAX;
        if self.depth_max == 0 { max as usize } else { self.depth_max.min(max) as usize }
    }
}

/// A base that is an FVD image itself.
pub(crate) struct FvdBase {
    pub image: Arc<Image>,
    pub files: Arc<Files>,
    pub length: u64,
}

pub(crate) enum BaseFile {
    Raw(RawFile),
    Fvd(Box<FvdBase>),
}

/// See the module's text.
pub struct Files {
    pub(crate) image: RawFile,
    pub(crate) data: Option<RawFile>,
    pub(crate) base: Option<BaseFile>,
    pub(crate) pool: Arc<Pool>,
    #[cfg_attr(not(feature = "uring"), allow(dead_code))] // Then there is nothing to choose.
    pub(crate) threads: bool,
    pub(crate) log: Option<LogFn>,
}

impl Files {
    /// Opens the image, its base and its data file where the options say so.
    pub fn open(path: &Path, options: &Options) -> Result<Arc<Self>> {
        let raw = RawFile::open(path, options.how())?;
        raw.lock(options.how())?;
        let mut chain = Chain { options, seen: vec![raw.identity] };
        chain.complete(raw, options.how(), options.metadata_only)
    }

    /// Opens an image that is to be made, or made anew: the file is there afterwards, with the
    /// content it had; the engine empties it once it has found nothing wrong. `base`: name,
    /// relative to the image, and format. `data`: name of the data file, likewise, which is there afterwards too.
    pub fn create(path: &Path, base: Option<(&str, &str)>, data: Option<&str>, options: &Options) -> Result<Arc<Self>> {
        let how = How { write: true, create: true, ..options.how() };
        // The base first: a wrong one must not cost the file its content, or leave a new one behind.
        let mut chain = Chain { options: &Options { allow_base: true, ..options.clone() }, seen: Vec::new() };
        let base = base.map(|(name, format)| chain.open_base(path, name, format)).transpose()?;
        let raw = RawFile::open(path, how)?;
        if chain.seen.contains(&raw.identity) {
            return Err(Error::new(Kind::Invalid, format!("'{}' cannot be made: it is in the chain of its own base", path.display())));
        }
        raw.lock(how)?;
        chain.seen.push(raw.identity);
        let data = data.map(|name| chain.open_data(path, name, "raw", how)).transpose()?;
        Ok(chain.files(raw, data, base))
    }

    /// What the files can do, by [`FileId`].
    pub fn limits(&self) -> [Limits; FILES] {
        let mut limits = [Limits::default(); FILES];
        limits[FileId::Image as usize] = self.image.limits;
        if let Some(data) = &self.data {
            limits[FileId::Data as usize] = data.limits;
        }
        if let Some(BaseFile::Raw(raw)) = &self.base {
            limits[FileId::Base as usize] = raw.limits;
        }
        limits
    }

    /// Every file of the chain, from the image to its last base, data files too.
    pub(crate) fn identities(&self) -> Vec<Identity> {
        let mut all = vec![self.image.identity];
        all.extend(self.data.as_ref().map(|data| data.identity));
        match &self.base {
            Some(BaseFile::Raw(raw)) => all.push(raw.identity),
            Some(BaseFile::Fvd(base)) => all.extend(base.files.identities()),
            None => {}
        }
        all
    }

    /// Whether both images have a base, and it is the same file, read the same way.
    pub(crate) fn same_base(&self, other: &Self) -> bool {
        match (&self.base, &other.base) {
            (Some(BaseFile::Raw(one)), Some(BaseFile::Raw(two))) => one.identity == two.identity,
            (Some(BaseFile::Fvd(one)), Some(BaseFile::Fvd(two))) => one.files.image.identity == two.files.image.identity,
            _ => false,
        }
    }

    /// The image's path, as it was given.
    pub fn path(&self) -> &Path {
        &self.image.path
    }

    /// Bytes that the image file takes on its file system; unknown for devices.
    pub fn allocated(&self) -> Option<u64> {
        self.image.allocated()
    }
}

/// Where a base or a data file lies: names are relative to the directory of the image that names them.
pub fn base_path(image: &Path, name: &str) -> Result<PathBuf> {
    full_path("base", image, name)
}

fn full_path(what: &str, image: &Path, name: &str) -> Result<PathBuf> {
    let name = name.strip_prefix("file:").unwrap_or(name);
    let head = name.split('/').next().unwrap_or_default();
    if head.contains(':') {
        let text = format!("{what} '{name}' is no plain path; this program opens files only");
        return Err(Error::new(Kind::Unsupported, text));
    }
    Ok(image.parent().unwrap_or(Path::new("")).join(name))
}

/// A chain of images on its way to being opened.
struct Chain<'a> {
    options: &'a Options,
    seen: Vec<Identity>,
}

impl Chain<'_> {
    fn files(&self, image: RawFile, data: Option<RawFile>, base: Option<BaseFile>) -> Arc<Files> {
        let threads = self.options.threads || std::env::var_os("FVD_HOST_AIO").is_some_and(|value| value == "threads");
        Arc::new(Files { image, data, base, pool: Arc::default(), threads, log: self.options.log.clone() })
    }

    /// Adds the base and the data file that the header of `raw` names, if they may be opened; the latter as
    /// `how` says. `lenient`: a data file that cannot be opened is left to a check.
    fn complete(&mut self, raw: RawFile, how: How, lenient: bool) -> Result<Arc<Files>> {
        let files = self.files(raw, None, None);
        if !self.options.allow_base && !self.options.allow_data {
            return Ok(files);
        }
        // An image whose header cannot be read says so when it is opened; not here.
        let Some(header) = header_of(&files) else { return Ok(files) };
        let base = if self.options.allow_base && !header.base_name.is_empty() { Some(self.open_base(files.path(), &header.base_name, &header.base_format)?) } else { None };
        let data = match header.data_name.as_str() {
            "" => None,
            _ if !self.options.allow_data => None,
            name => match self.open_data(files.path(), name, &header.data_format, how) {
                Err(error) if lenient => {
                    if let Some(log) = &self.options.log {
                        log(LogLevel::Warning, &error.text);
                    }
                    None
                }
                other => Some(other?),
            },
        };
        let mut files = Arc::into_inner(files).expect("nobody else has the files yet");
        (files.base, files.data) = (base, data);
        Ok(Arc::new(files))
    }

    fn open_data(&mut self, image: &Path, name: &str, format: &str, how: How) -> Result<RawFile> {
        let within = |error: Error| error.context(&format!("data file of '{}'", image.display()));
        let path = full_path("data file", image, name).map_err(within)?;
        if format != "raw" {
            let text = format!("'{}': format '{format}' is not supported here, only raw", path.display());
            return Err(within(Error::new(Kind::Unsupported, text)));
        }
        self.open_member(&path, how, "is the image itself, or in its chain of bases").map_err(within)
    }

    /// A file that is not in the chain yet; `again`: what one that is, is.
    fn open_member(&mut self, path: &Path, how: How, again: &str) -> Result<RawFile> {
        // Before the lock: an image under itself would find itself locked.
        let raw = RawFile::open(path, how)?;
        if self.seen.contains(&raw.identity) {
            return Err(Error::new(Kind::Invalid, format!("'{}' {again}", path.display())));
        }
        self.seen.push(raw.identity);
        raw.lock(how)?;
        Ok(raw)
    }

    fn open_base(&mut self, image: &Path, name: &str, format: &str) -> Result<BaseFile> {
        let within = |error: Error| error.context(&format!("base of '{}'", image.display()));
        let path = base_path(image, name).map_err(within)?;
        if self.seen.len() >= self.options.depth_max() {
            let text = format!("'{}': the chain of bases is longer than {}", path.display(), self.options.depth_max());
            return Err(within(Error::new(Kind::Unsupported, text)));
        }
        let how = How { write: false, create: false, ..self.options.how() };
        if !matches!(format, "raw" | "fvd") {
            let text = format!("'{}': format '{format}' is not supported here, only raw and fvd", path.display());
            return Err(within(Error::new(Kind::Unsupported, text)));
        }
        let raw = self.open_member(&path, how, "is its own base: the chain is a circle").map_err(within)?;
        if format == "raw" {
            return Ok(BaseFile::Raw(raw));
        }
        let files = self.complete(raw, how, false)?;
        let config = Config { read_only: true, metadata_only: false, ..self.options.config(files.limits()) };
        let image = open_image(&files, config).map_err(|error| error.context(&format!("'{}'", path.display())))?;
        let length = image.info()?.header.virtual_size;
        Ok(BaseFile::Fvd(Box::new(FvdBase { image, files, length })))
    }
}

/// Opens an image on this thread and waits for it.
fn open_image(files: &Arc<Files>, config: Config) -> Result<Arc<Image>> {
    let io = Rc::new(FileIo::new(Arc::clone(files))?);
    let image = Image::new(config);
    let queue = Queue::new(Arc::clone(&image), LocalHost::new(Rc::clone(&io)), Box::new(io.wake_handle()));
    crate::disk::wait(&io, &queue, Request::Open, &mut |_| {})?;
    while !queue.is_idle() {
        io.turn(&queue, None)?;
    }
    Ok(image)
}

/// An image's header, if it can be read.
fn header_of(files: &Arc<Files>) -> Option<Header> {
    let config = Config { limits: files.limits(), read_only: true, no_io: true, ..Config::default() };
    Some(open_image(files, config).ok()?.info().ok()?.header)
}
