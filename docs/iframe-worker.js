// Search in pages that are opened as files: browsers give those no Worker, so the script runs in a hidden frame.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.srcdoc = `<!doctype html><script src="${new URL(url, location.href)}"><\/script>`
      document.body.append(this.frame)
      this.frame.addEventListener("load", () => {
        this.inside = this.frame.contentWindow
        this.inside.postMessage = data => this.tell(this, data)
        for (const data of this.waiting.splice(0)) this.tell(this.inside, data)
      })
    }

    tell(target, data) {
      setTimeout(() => target.dispatchEvent(new MessageEvent("message", { data })))
    }

    postMessage(data) {
      if (this.inside) this.tell(this.inside, data)
      else this.waiting.push(data)
    }

    terminate() {
      this.frame.remove()
    }
  }
  window.Worker = window.IFrameWorker
}
