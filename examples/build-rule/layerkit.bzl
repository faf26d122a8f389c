"""shrunk_image: an image archive without the bytes that its layers hold twice or hide.

    load(":layerkit.bzl", "shrunk_image")

    shrunk_image(
        name = "app_small",
        src = ":app.tar",
        keep_base = "@debian//:image.tar",
    )

`shrink` is a py_binary of shrink_image.py with layerkit among its deps. For Buck2 the same action is
`ctx.actions.run(cmd_args(...), category = "layerkit")`.
"""

def _shrunk_image_impl(ctx):
    image = ctx.actions.declare_file(ctx.label.name + ".tar")
    report = ctx.actions.declare_file(ctx.label.name + ".json")
    inputs = [ctx.file.src]
    arguments = ["--src", ctx.file.src.path, "--dst", image.path, "--report", report.path]
    if ctx.file.keep_base:
        inputs.append(ctx.file.keep_base)
        arguments += ["--keep-base", ctx.file.keep_base.path]
    for text in ctx.attr.uid_map:
        arguments += ["--uid-map", text]
    ctx.actions.run(
        executable = ctx.executable.shrink,
        arguments = arguments,
        inputs = inputs,
        outputs = [image, report],
        mnemonic = "LayerkitShrink",
        progress_message = "Shrinking image %s" % ctx.label.name,
    )
    return [DefaultInfo(files = depset([image])), OutputGroupInfo(report = depset([report]))]

shrunk_image = rule(
    implementation = _shrunk_image_impl,
    attrs = {
        "src": attr.label(allow_single_file = [".tar"], mandatory = True),
        "keep_base": attr.label(allow_single_file = [".tar"]),
        "uid_map": attr.string_list(),
        "shrink": attr.label(default = "//tools:shrink_image", executable = True, cfg = "exec"),
    },
)
