//! nginx in a pod.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use crate::{pod::Pod, process::Command};

/// nginx with one worker in the foreground, which keeps its files in `folder`; `http` is what stands
/// in that section of its configuration, the servers among it. Yet to be spawned.
pub fn nginx(pod: &Pod, folder: &Path, http: &str) -> Result<Command> {
    let within = folder.display();
    let configuration = format!(
        "daemon off;\n\
         user root;\n\
         worker_processes 1;\n\
         worker_rlimit_nofile 20000;\n\
         pid {within}/nginx.pid;\n\
         error_log stderr warn;\n\
         events {{ worker_connections 10000; }}\n\
         http {{\n\
         access_log off;\n\
         client_body_temp_path {within}/body;\n\
         proxy_temp_path {within}/proxy;\n\
         fastcgi_temp_path {within}/fastcgi;\n\
         uwsgi_temp_path {within}/uwsgi;\n\
         scgi_temp_path {within}/scgi;\n\
         {http}\n\
         }}\n"
    );
    let file = folder.join("nginx.conf");
    fs::write(&file, configuration).with_context(|| file.display().to_string())?;
    let words = [
        "nginx".as_ref(),
        "-e".as_ref(),
        "stderr".as_ref(),
        "-c".as_ref(),
        file.as_os_str(),
    ];
    Ok(pod.command(words))
}
