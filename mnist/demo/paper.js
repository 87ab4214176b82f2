// The paper that one draws on, in the browser. What is on it goes to Python as a data URL: a drawing as a PNG, black ink
// on white, a photograph as the file that it is, blank paper as nothing.
const paper = element.querySelector('canvas'), pen = paper.getContext('2d');
const file = element.querySelector('input[type=file]'), hint = element.querySelector('.hint');
const PAUSE_MS = 60;  // between two looks at a drawing that goes on
let timer = null, photograph = null, last = null;

function clear() {
    pen.fillStyle = 'white';
    pen.fillRect(0, 0, paper.width, paper.height);
    photograph = null;
    paper.classList.add('ink');
    hint.hidden = false;
}

window.pictureOnPaper = () => photograph ?? (hint.hidden ? paper.toDataURL('image/png') : '');

function place(event) {
    const box = paper.getBoundingClientRect();
    return [(event.clientX - box.left) * paper.width / box.width, (event.clientY - box.top) * paper.height / box.height];
}

function draw(event) {
    pen.beginPath();
    pen.moveTo(...last);
    for (const part of event.getCoalescedEvents?.() ?? []) pen.lineTo(...place(part));
    last = place(event);
    pen.lineTo(...last);
    pen.stroke();
    timer ??= setTimeout(() => { timer = null; trigger('input'); }, PAUSE_MS);
}

paper.addEventListener('pointerdown', event => {
    event.preventDefault();
    if (!event.isPrimary || event.button !== 0) return;
    if (photograph) clear();
    hint.hidden = true;
    paper.setPointerCapture(event.pointerId);
    Object.assign(pen, {lineWidth: 30, lineCap: 'round', lineJoin: 'round', strokeStyle: 'black'});
    last = place(event);
    draw(event);
});
paper.addEventListener('pointermove', event => { if (paper.hasPointerCapture(event.pointerId)) draw(event); });

async function show(chosen) {
    if (!chosen) return;
    const content = await new Promise(resolve => {
        const reader = new FileReader();
        reader.onload = () => resolve(reader.result);
        reader.readAsDataURL(chosen);
    });
    clear();
    hint.hidden = true;
    paper.classList.remove('ink');
    photograph = content;
    trigger('input');
    try {
        const image = await createImageBitmap(chosen);
        const zoom = Math.min(paper.width / image.width, paper.height / image.height);
        const [width, height] = [image.width * zoom, image.height * zoom];
        pen.drawImage(image, (paper.width - width) / 2, (paper.height - height) / 2, width, height);
    } catch {  // a format that the browser cannot show; Python may read it all the same
        Object.assign(pen, {fillStyle: 'black', font: '20px sans-serif'}).fillText(chosen.name, 20, 40);
    }
}

file.addEventListener('change', () => { show(file.files[0]); file.value = ''; });
element.addEventListener('dragover', event => event.preventDefault());
element.addEventListener('drop', event => { event.preventDefault(); show(event.dataTransfer.files[0]); });
document.addEventListener('paste', event => show(event.clipboardData.files[0]));
element.querySelector('.clear').addEventListener('click', () => { clear(); trigger('input'); });
clear();
